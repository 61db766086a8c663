"""A Hugging Face folder with torchao's tensors: low-bit weights that stay low-bit in PyTorch's memory.

The deliverable of choice for those who go on in PyTorch (``torch.compile``, ``torch.export``, ExecuTorch). A model that
was trained on an integer grid is written from its codes, zero points included; nothing is rounded a second time. Every
code takes a byte on disk and in memory, of 4 bits and fewer too: a small file is what
:mod:`huggingface <distill.exporters.huggingface>` and :mod:`gguf <distill.exporters.gguf>` are for.

Source: https://github.com/pytorch/ao, and the safetensors of its tensors in transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.core.errors import InputError
from distill.exporters.base import (
    CardFacts,
    ExporterSpec,
    VerifyResult,
    cache_notes,
    new_folder,
    require_engine,
    require_writers,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from distill.quantization.base import Codes, QuantizerSpec
    from distill.quantization.inputs import ActivationSpec


class Torchao(ExporterSpec):
    """A Hugging Face folder with torchao tensors, run by PyTorch."""

    engine: ClassVar[str] = "transformers with torchao, in fp32,"
    engine_module: ClassVar[str | None] = "torchao"
    extra: ClassVar[str | None] = "torchao"

    kind: Literal["torchao"] = "torchao"
    round_to: Literal["int8"] | None = None
    """Grid that a full-precision model's layers are rounded to, one scale a channel (then set max_kl to the loss that
    you accept); unset: the codes that a low-bit model was trained with."""

    def writers(self) -> tuple[str, ...]:
        return ("torchao",)

    def check_grids(self, grids: Sequence[QuantizerSpec], activations: ActivationSpec | None) -> None:
        if bool(grids) == bool(self.round_to):
            found = "low-bit already; leave round_to out" if grids else "not low-bit; set round_to: int8"
            raise InputError(f"target torchao: the model's weights are {found}")
        if activations is not None:
            raise InputError(
                f"target torchao: only low-bit weights can be written, and activations {activations.kind} round inputs"
            )
        for grid in grids:
            if grid.include:
                raise InputError(f"target torchao: codes of embeddings (include: {list(grid.include)}) have no tensor")
            if grid.compressed_tensors_arguments()["type"] != "int":
                raise InputError(f"target torchao: its tensors hold integer codes only, not those of {grid.label()}")

    def export(self, source_folder: Path, folder: Path, *, title: str) -> list[str]:
        require_writers(self)
        from distill.data.tokenizer import load_tokenizer
        from distill.exporters.stored import bits_of
        from distill.models.load import without_bars

        new_folder(source_folder, folder)
        bits = bits_of(source_folder)
        if bool(bits) == bool(self.round_to):
            found = "low-bit already; leave round_to out" if bits else "not low-bit; set round_to: int8"
            raise InputError(f"{source_folder}: its weights are {found}, to export it as torchao")
        with without_bars(str(source_folder)):
            model = _rounded(source_folder) if self.round_to else _with_codes(source_folder, bits)
            model.save_pretrained(folder)
        load_tokenizer(source_folder).save_pretrained(folder)
        cache = cache_notes(source_folder, "which plain transformers does not have: it was verified with it put in")
        if self.round_to:
            return ["linear layers: int8 a channel, rounded to nearest here, after training", *cache]
        widths = ", ".join(str(width) for width in sorted(set(bits.values())))
        return [
            f"{len(bits)} layers from their codes of {widths} bits, a byte each; everything else in float32",
            *cache,
        ]

    def verify(
        self,
        source_model: PreTrainedModel,
        folder: Path,
        batches: Iterable[Mapping[str, Tensor]],
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> VerifyResult:
        require_engine(self)
        from distill.exporters.huggingface import verify

        return verify(source_model, folder, batches, max_kl=self.max_kl)

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


def _rounded(source_folder: Path) -> PreTrainedModel:
    """A full-precision model with torchao's int8 weights."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    scheme = TorchAoConfig(Int8WeightOnlyConfig())
    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(
        str(source_folder), dtype=torch.float32, use_safetensors=True, quantization_config=scheme
    )


def _with_codes(source_folder: Path, bits: dict[str, int]) -> PreTrainedModel:
    """A low-bit model whose weights are torchao's tensors of the very codes.

    Raises:
        InputError: torchao's tensors cannot stand for one of them, or the model rounds its activations.
    """
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from transformers import TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    from distill.exporters.stored import stored_weights
    from distill.models.load import load_model
    from distill.quantization.base import Codes
    from distill.quantization.fake_quant import InputQuantLinear

    model = load_model(str(source_folder), dtype="float32")
    layers = dict(model.named_modules())
    if rounding := [name for name, layer in layers.items() if isinstance(layer, InputQuantLinear)]:
        raise InputError(f"{rounding[0]}: rounds its activations, and only low-bit weights can be written as torchao")
    for key, codes in stored_weights(source_folder):
        if isinstance(codes, Codes):
            name = key.removesuffix(".weight")
            if not isinstance(layers[name], torch.nn.Linear):
                raise InputError(f"{name}: its codes are no linear layer's, and cannot be written as torchao")
            layers[name].weight = torch.nn.Parameter(_tensor(name, codes, bits[name]), requires_grad=False)
    left = [name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear) and name not in bits]
    width = getattr(torch, f"int{max(bits.values())}")
    scheme = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=width), modules_to_not_convert=left)
    model.config.quantization_config = scheme
    untyped: Any = model
    untyped.hf_quantizer = AutoHfQuantizer.from_config(scheme, pre_quantized=True)
    return model


def _tensor(name: str, codes: Codes, bits: int) -> torch.Tensor:
    import torch
    from torchao.quantization import IntxUnpackedToInt8Tensor

    if codes.values.dtype != torch.int8:
        what = str(codes.values.dtype).removeprefix("torch.")
        raise InputError(f"{name}: its codes are {what}, and torchao's tensors of codes hold integers only")
    scale = codes.scale.float()
    zero_point = torch.zeros_like(scale, dtype=torch.int8) if codes.zero_point is None else codes.zero_point
    return IntxUnpackedToInt8Tensor(
        qdata=codes.values,
        scale=scale,
        zero_point=zero_point,
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=(1, codes.values.shape[-1] // scale.shape[-1]),
        dtype=torch.float32,
        activation_quantization=None,
    )
