"""One GGUF file for llama.cpp, Ollama and programs built on them, with the tokenizer and an Ollama ``Modelfile``.

Use it for CPUs, laptops and phones: llama.cpp computes fast with low-bit weights without a GPU. A model that was
trained with one of llama.cpp's formats (q8_0, q6_k, q4_0, tq2_0), or with symmetric integer codes in groups of a
multiple of 32 (int_group), is written from its codes without a second rounding. A full-precision model is written as
F16, or rounded by the exporter to ``round_to``. Embeddings and output head are written from their codes as well. If
they have no codes and the layers have 4 bits or fewer, they are rounded to Q8_0, because in a small model they are most
of the bytes.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill.core.errors import DistillError, InputError
from distill.exporters.base import (
    CardFacts,
    ExporterSpec,
    VerifyResult,
    new_folder,
    require_close,
    require_engine,
    require_writers,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from distill.quantization.base import QuantizerSpec
    from distill.quantization.inputs import ActivationSpec


class Gguf(ExporterSpec):
    """A GGUF file, run by llama.cpp."""

    engine: ClassVar[str] = "llama.cpp"
    engine_module: ClassVar[str | None] = "llama_cpp"
    extra: ClassVar[str | None] = "gguf"
    runs_in: ClassVar[str] = "distill.exporters.llama_cpp_engine"
    environment: ClassVar[str] = "CMAKE_ARGS=-DGGML_NATIVE=OFF "  # for virtual machines too

    kind: Literal["gguf"] = "gguf"
    max_kl: float = Field(5e-2, ge=0)
    """Bound on the KL divergence of any token between the trained model and the file in llama.cpp, in nats. llama.cpp
    rounds activations to 8 bits for low-bit weights, which costs a few thousandths at the worst token of a small model;
    F16 costs less than 1e-4. 0 requires equal probabilities."""
    round_to: Literal["q8_0", "q4_0"] | None = None
    """Format to which the layers of a full-precision model are rounded; null: as trained (codes, or F16)."""
    embeddings: Literal["f16", "f32", "q8_0", "q6_k"] | None = None
    """Format of embeddings and output head that were not trained with a quantizer; null: q8_0 if the layers have 4 bits
    or fewer and 32 divides the length of the rows, else f16."""

    def writers(self) -> tuple[str, ...]:
        return ("gguf",)

    def check_grids(
        self,
        grids: Sequence[QuantizerSpec],
        activations: ActivationSpec | None,
        embeddings: QuantizerSpec | None = None,
    ) -> None:
        if self.round_to and grids:
            raise InputError("target gguf: the model's weights are low-bit already; remove round_to")
        if self.embeddings and embeddings:
            raise InputError(
                f"target gguf: the model's embeddings are {embeddings.label()} already; remove embeddings from the "
                "target, or train with embeddings: keep"
            )
        for grid in [*grids, *([embeddings] if embeddings else [])]:
            arguments = grid.compressed_tensors_arguments()
            if arguments["type"] != "int" or not arguments["symmetric"]:
                raise InputError(
                    f"target gguf: GGUF has no format for {grid.label()}; train with a symmetric integer quantizer "
                    "(q8_0, q4_0, int_group, ternary)"
                )
            if (arguments.get("group_size") or 32) % 32 and grid.gguf_type is None:
                raise InputError(
                    f"target gguf: llama.cpp's formats have one scale per 32 weights (got {grid.label()}); set "
                    "group_size to a multiple of 32"
                )

    def check_model(self, location: str, config: PretrainedConfig | None, tokenizer: PreTrainedTokenizerFast) -> None:
        from distill.exporters.gguf_model import architecture_of
        from distill.exporters.gguf_vocabulary import check_tokenizer

        if config is not None:
            architecture_of(Path(location), config)
            if self.embeddings == "q6_k" and config.hidden_size % 256:
                raise InputError(
                    "target gguf: embeddings: q6_k needs rows of a multiple of 256 weights (got "
                    f"{config.hidden_size}); choose q8_0"
                )
        check_tokenizer(tokenizer)

    def export(self, source_folder: Path, folder: Path, *, title: str) -> list[str]:
        require_writers(self)
        from distill.exporters.gguf_file import write

        new_folder(source_folder, folder)
        return write(source_folder, folder, title=title, round_to=self.round_to, embeddings=self.embeddings)

    def verify(
        self,
        source_model: PreTrainedModel,
        folder: Path,
        batches: Iterable[Mapping[str, Tensor]],
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> VerifyResult:
        require_engine(self)
        from distill.exporters.llama_cpp import compared

        return require_close(compared(source_model, file_of(folder), batches, tokenizer), self.max_kl, folder)

    def label(self, folder: Path) -> str:
        return f"GGUF {self._formats(folder)[0]}"

    def num_bytes(self, folder: Path) -> int:
        return file_of(folder).stat().st_size

    def post_training(self, folder: Path) -> ExporterSpec | None:
        layers, embeddings = self._formats(folder)
        wanted = {"round_to": None if layers == "F16" else layers.lower(), "embeddings": embeddings.lower()}
        try:
            return Gguf.model_validate({**self.model_dump(), **wanted})
        except ValueError:  # of ternary weights, which nobody rounds to after training
            return None

    def _formats(self, folder: Path) -> tuple[str, str]:
        """Of the layers and of the embeddings."""
        from distill.exporters.gguf_formats import formats_of

        return formats_of(file_of(folder))

    def card(self, folder: Path) -> CardFacts:
        file = file_of(folder)
        return CardFacts(
            library="gguf",
            tags=("gguf", "llama.cpp"),
            quantized=True,
            how_to_load=(
                f"```sh\nllama-cli -m {file.name} -p 'Once'         # llama.cpp\n"
                f"ollama create {file.stem} -f Modelfile   # Ollama\n```\n\n"
                "```python\nfrom llama_cpp import Llama  # pip install llama-cpp-python\n\n"
                f'print(Llama("{file.name}")("Once", max_tokens=32)["choices"][0]["text"])\n```'
            ),
        )


def file_of(folder: Path) -> Path:
    """The GGUF file of an export.

    Raises:
        DistillError: there is none, or several.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise DistillError(f"{folder}: contains {len(files)} GGUF files, expected one; export the model again")
    return files[0]
