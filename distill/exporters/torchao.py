"""A Hugging Face folder with torchao's tensor subclasses: weights are low-bit in PyTorch's memory as well.

Use it for further work in PyTorch (``torch.compile``, ``torch.export``, ExecuTorch). A model that was trained with an
integer quantizer is written from its codes, including zero points, without a second rounding. Every code takes one byte
on disk and in memory, also at 4 bits and fewer; for small files use :mod:`huggingface <distill.exporters.huggingface>`
or :mod:`gguf <distill.exporters.gguf>`.

Source: https://github.com/pytorch/ao, and the safetensors of its tensors in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.core.errors import InputError
from distill.exporters.base import (
    CardFacts,
    ExporterSpec,
    VerifyResult,
    new_folder,
    require_engine,
    require_writers,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from distill.quantization.base import QuantizerSpec
    from distill.quantization.inputs import ActivationSpec


class Torchao(ExporterSpec):
    """A Hugging Face folder with torchao tensors, run by PyTorch."""

    engine: ClassVar[str] = "transformers with torchao, in fp32,"
    engine_module: ClassVar[str | None] = "torchao"
    extra: ClassVar[str | None] = "torchao"

    kind: Literal["torchao"] = "torchao"
    round_to: Literal["int8"] | None = None
    """int8: round the layers of a full-precision model, one scale per channel (and set max_kl to an acceptable value);
    null: write the codes of a quantized model."""
    embeddings: Literal["int8"] | None = None
    """int8: round embeddings and output head that were not trained with a quantizer, one scale per row (and set max_kl
    to an acceptable value); null: their codes if they have any, else float32."""

    def writers(self) -> tuple[str, ...]:
        return ("torchao",)

    def check_grids(
        self,
        grids: Sequence[QuantizerSpec],
        activations: ActivationSpec | None,
        embeddings: QuantizerSpec | None = None,
    ) -> None:
        if bool(grids) == bool(self.round_to):
            found = "low-bit already; remove round_to" if grids else "not low-bit; set round_to: int8"
            raise InputError(f"target torchao: the model's weights are {found}")
        if activations is not None:
            raise InputError(
                "target torchao: supports low-bit weights, but no quantized activations (got "
                f"{activations.kind}); remove "
                "activations from the quantize stage, or choose another target"
            )
        if self.embeddings and embeddings:
            raise InputError(
                f"target torchao: the model's embeddings are {embeddings.label()} already; remove embeddings from the "
                "target, or train with embeddings: keep"
            )
        for grid in grids:
            if grid.compressed_tensors_arguments()["type"] != "int":
                raise InputError(
                    f"target torchao: supports integer codes only (got {grid.label()}); train with an integer quantizer"
                )

    def export(self, source_folder: Path, folder: Path, *, title: str) -> list[str]:
        require_writers(self)
        from distill.exporters.torchao_tensors import write

        new_folder(source_folder, folder)
        rounds, rounds_ends = self.round_to is not None, self.embeddings is not None
        return write(source_folder, folder, rounds=rounds, rounds_ends=rounds_ends)

    def verify(
        self,
        source_model: PreTrainedModel,
        folder: Path,
        batches: Iterable[Mapping[str, Tensor]],
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> VerifyResult:
        require_engine(self)
        from distill.exporters.plain_transformers import verify

        return verify(source_model, folder, batches, max_kl=self.max_kl)

    def label(self, folder: Path) -> str:
        return "torchao int8"  # a byte per code, also of 4 bits

    def post_training(self, folder: Path) -> ExporterSpec | None:
        scheme = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        embeddings = "int8" if scheme.get("include_input_output_embeddings") else None
        return self.model_copy(update={"round_to": "int8", "embeddings": embeddings})

    def card(self, folder: Path) -> CardFacts:
        return CardFacts(
            library="transformers",
            tags=("torchao",),
            quantized=True,
            how_to_load=(
                "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer  # pip install torchao\n\n"
                'folder = "."  # this folder, or its Hub id\n'
                "model = AutoModelForCausalLM.from_pretrained(folder)\n"
                "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
            ),
        )
