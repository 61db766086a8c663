"""One GGUF file for llama.cpp, Ollama and what is built on them, with its tokenizer and an Ollama ``Modelfile``.

The deliverable of choice for a CPU, a laptop or a phone: the one engine in which low-bit weights are fast without a
GPU. A model that was trained on a grid of llama.cpp's (q8_0, q4_0, tq2_0), or on any symmetric integer grid with groups
of a multiple of 32 (int_group), is written from its codes: nothing is rounded a second time. A full-precision model
is written as F16, or rounded here with ``round_to``.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill.core.artifact import Artifact
from distill.core.errors import DistillError, InputError
from distill.exporters.base import (
    CardFacts,
    ExporterSpec,
    VerifyResult,
    cache_notes,
    new_folder,
    require_close,
    require_engine,
    require_writers,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from distill.exporters.gguf_blocks import FileTensor
    from distill.quantization.base import QuantizerSpec
    from distill.quantization.inputs import ActivationSpec

ENDS = ("token_embd.weight", "output.weight")
USUAL_CONTEXT = 8192
"""Tokens that Ollama makes room for at once; keys and values of the 128k that models can read would fill a laptop."""


class Gguf(ExporterSpec):
    """A GGUF file, run by llama.cpp."""

    engine: ClassVar[str] = "llama.cpp"
    engine_module: ClassVar[str | None] = "llama_cpp"
    extra: ClassVar[str | None] = "gguf"

    kind: Literal["gguf"] = "gguf"
    max_kl: float = Field(5e-2, ge=0)
    """Largest KL, in nats, of any token between the trained model and the file in llama.cpp, which rounds activations
    to 8 bits before it multiplies them with low-bit weights: some thousandths at the worst token of a small model, F16
    less than 1e-4; 0 demands equal probabilities."""
    round_to: Literal["q8_0", "q4_0"] | None = None
    """Grid that the layers of a full-precision model are rounded to; unset: as trained (codes stay codes, else F16)."""
    embeddings: Literal["f16", "f32", "q8_0"] = "f16"
    """How embeddings and output head are stored if they were not trained on a grid."""

    def writers(self) -> tuple[str, ...]:
        return ("gguf",)

    def check_grids(self, grids: Sequence[QuantizerSpec], activations: ActivationSpec | None) -> None:
        if self.round_to and grids:
            raise InputError("target gguf: the model's weights are low-bit already; leave round_to out")
        for grid in grids:
            words = grid.compressed_tensors_arguments()
            if words["type"] != "int" or not words["symmetric"]:
                raise InputError(
                    f"target gguf: has no format for {grid.label()}; train on a symmetric integer grid (q8_0, q4_0, "
                    "int_group, ternary)"
                )
            if (words.get("group_size") or 32) % 32:
                raise InputError(
                    f"target gguf: {grid.label()}: llama.cpp's formats share a scale among 32 weights; set a "
                    "group_size that is a multiple of 32"
                )

    def export(self, source_folder: Path, folder: Path, *, title: str) -> list[str]:
        require_writers(self)
        from gguf import GGUFWriter, LlamaFileType

        from distill.data.tokenizer import load_tokenizer
        from distill.exporters.gguf_model import add_model, architecture_of
        from distill.exporters.gguf_vocabulary import add_vocabulary
        from distill.models.kv_cache import cache_type
        from distill.models.load import load_config

        new_folder(source_folder, folder)
        config = load_config(str(source_folder))
        tokenizer = load_tokenizer(source_folder)
        # tensors wait in a temporary file, not in memory, until the header is complete
        writer = GGUFWriter(folder / f"{title}.gguf", architecture_of(source_folder, config).name, use_temp_file=True)
        try:
            writer.add_name(title)
            add_model(writer, config)
            add_vocabulary(writer, tokenizer, config)
            written = _add_tensors(writer, self._blocks(source_folder))
            layers = written.formats or written.ends
            file_type = "ALL_F32" if layers.most_common(1)[0][0] == "F32" else f"MOSTLY_{layers.most_common(1)[0][0]}"
            writer.add_file_type(LlamaFileType[file_type])
            writer.add_quantization_version(2)
            lineage = Artifact(title, str(source_folder)).lineage()
            if lineage and lineage.licence:
                writer.add_license(lineage.licence)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        num_tensors = _read_back(folder / f"{title}.gguf", self._blocks(source_folder))
        cache = cache_type(config)
        (folder / "Modelfile").write_text(_modelfile(title, tokenizer, config.max_position_embeddings, cache))
        return [
            *written.notes(self.round_to),
            *_input_notes(config),
            *cache_notes(source_folder, f"so run it with `-fa on --cache-type-k {cache} --cache-type-v {cache}`"),
            f"read back: {num_tensors} tensors hold what was to be written, bit for bit",
        ]

    def verify(
        self,
        source_model: PreTrainedModel,
        folder: Path,
        batches: Iterable[Mapping[str, Tensor]],
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> VerifyResult:
        require_engine(self)
        from distill.exporters.compare import compare, plain_logits
        from distill.exporters.llama_cpp import LlamaCpp
        from distill.models.kv_cache import cache_type

        file = file_of(folder)
        batches = list(batches)
        longest = max((batch["input_ids"].shape[-1] for batch in batches), default=1)
        with LlamaCpp(file, context_tokens=longest, cache=cache_type(source_model.config)) as engine:
            if tokenizer is not None:
                engine.check_tokenizer(tokenizer, [row for batch in batches for row in batch["input_ids"].tolist()])
            with plain_logits(source_model) as source:
                result = compare(source, engine.logits, batches, folder, file.stat().st_size)
        return require_close(result, self.max_kl, folder)

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

    def _blocks(self, source_folder: Path) -> Iterator[tuple[str, FileTensor]]:
        """(llama.cpp's name, weight as in the file) of every tensor."""
        import torch

        from distill.exporters.gguf_blocks import code_blocks, plain_blocks
        from distill.exporters.gguf_model import architecture_of, in_order, rope_factors, tensor_names
        from distill.exporters.stored import bits_of, stored_weights
        from distill.models.load import load_config
        from distill.quantization.base import Codes

        config = load_config(str(source_folder))
        architecture = architecture_of(source_folder, config)
        name_of = tensor_names(architecture, config)
        if self.round_to and bits_of(source_folder):
            raise InputError(
                f"{source_folder}: its weights are low-bit already; leave round_to out, and their codes are written"
            )
        if factors := rope_factors(config):
            yield "rope_freqs.weight", plain_blocks("rope_freqs", torch.tensor(factors), "f32")
        for key, weight in stored_weights(source_folder):
            if key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and config.tie_word_embeddings):
                continue  # llama.cpp computes the first, and takes the embeddings for the second
            name, weight = name_of(key), in_order(key, weight, architecture, config)
            if isinstance(weight, Codes):
                blocks: FileTensor = code_blocks(key, weight)
            elif weight.ndim == 1:
                blocks = plain_blocks(key, weight, "f32")
            else:
                blocks = plain_blocks(key, weight, self.embeddings if name in ENDS else self.round_to or "f16")
            yield name, blocks


def _input_notes(config: Any) -> list[str]:
    """A line on the activations' grid that the model was trained with, which the file cannot hold."""
    groups = (getattr(config, "quantization_config", None) or {}).get("config_groups", {}).values()
    if not any(group.get("input_activations") for group in groups):
        return []
    return [
        "activations: the grid that was trained is left out; llama.cpp rounds inputs to 8 bits, 32 or 256 at a time"
    ]


class _Written:
    """What went into a file: formats of the layers and of the ends, and scales that had to move."""

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.from_codes = self.moved_scales = 0

    def notes(self, round_to: str | None) -> list[str]:
        """The same in words."""
        layers = ", ".join(f"{count} as {kind}" for kind, count in self.formats.most_common())
        how = "rounded to nearest here, after training" if round_to else "as they were trained"
        notes = [
            f"layers: {layers}, {how}" + (f"; {self.from_codes} from their codes" if self.from_codes else ""),
            f"embeddings and head: {', '.join(self.ends)}",
        ]
        if self.moved_scales:
            notes.append(f"{self.moved_scales} scales are too small for fp16 to hold exactly and were rounded to it")
        return notes


def _add_tensors(writer: Any, tensors: Iterator[tuple[str, FileTensor]]) -> _Written:
    from gguf import GGMLQuantizationType

    written = _Written()
    for name, blocks in tensors:
        writer.add_tensor(name, blocks.data, raw_dtype=GGMLQuantizationType[blocks.format])
        if name in ENDS:
            written.ends[blocks.format] += 1
        elif blocks.data.ndim > 1:
            written.formats[blocks.format] += 1
        written.from_codes += blocks.from_codes
        written.moved_scales += blocks.moved_scales
    return written


def _read_back(file: Path, tensors: Iterator[tuple[str, FileTensor]]) -> int:
    """Hold every tensor of the file, as another reader decodes it, against what it has to stand for.

    Raises:
        DistillError: one differs in a single bit.
    """
    import numpy
    from gguf import GGUFReader, quants

    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for name, blocks in tensors:
        tensor = stored.pop(name, None)
        if tensor is None or not numpy.array_equal(
            quants.dequantize(tensor.data, tensor.tensor_type).reshape(blocks.values.shape), blocks.values
        ):
            raise DistillError(f"{file}: tensor {name} is not what was written; is the disk sound?")
    if stored:
        raise DistillError(f"{file}: has tensors that were not written: {', '.join(stored)}")
    return len(GGUFReader(file).tensors)


def _modelfile(title: str, tokenizer: PreTrainedTokenizerFast, context_tokens: int, cache: str | None) -> str:
    """What ``ollama create`` reads. Without a chat template the model is to go on with the text as it is given."""
    lines = [f"FROM ./{title}.gguf", f"PARAMETER num_ctx {min(context_tokens, USUAL_CONTEXT)}"]
    if context_tokens > USUAL_CONTEXT:
        lines.append(f"# the model reads up to {context_tokens} tokens, in memory that grows with num_ctx")
    if cache is not None:  # no parameter of a model there
        lines.insert(0, f"# serve it with OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE={cache}")
    return "\n".join([*lines, *([] if tokenizer.chat_template else ['TEMPLATE """{{ .Prompt }}"""'])]) + "\n"


def file_of(folder: Path) -> Path:
    """The one GGUF file of an export.

    Raises:
        DistillError: there is none, or several.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise DistillError(f"{folder}: {len(files)} GGUF files in it, expected one")
    return files[0]
