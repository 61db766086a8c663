"""Write a model folder as one GGUF file, and read every tensor of it back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, quants
from transformers import PreTrainedTokenizerFast

from distill.core.artifact import Artifact
from distill.core.errors import DistillError, InputError
from distill.data.tokenizer import load_tokenizer
from distill.exporters.base import cache_notes
from distill.exporters.gguf_blocks import FileTensor, code_blocks, plain_blocks
from distill.exporters.gguf_model import add_model, architecture_of, in_order, rope_factors, tensor_names
from distill.exporters.gguf_vocabulary import add_vocabulary
from distill.exporters.stored_weights import bits_of, stored_weights
from distill.models.kv_cache import cache_type
from distill.models.load import load_config
from distill.quantization.base import Codes
from distill.quantization.blocks import BLOCK
from distill.quantization.embeddings import FEW_BITS

ENDS = ("token_embd.weight", "output.weight")
USUAL_CONTEXT = 8192
"""Default context for Ollama: a KV cache for the 128k tokens that some models support would not fit into a laptop."""


def write(source_folder: Path, folder: Path, *, title: str, round_to: str | None, embeddings: str | None) -> list[str]:
    """Write the export, without a model card; see :meth:`~distill.exporters.base.ExporterSpec.export`.

    Args:
        source_folder: the model's folder.
        folder: an empty folder.
        title: name of the model.
        round_to: the format to which the layers of a full-precision model are rounded, or None.
        embeddings: the format of embeddings and output head that are not quantized; None: by the bits of the layers.

    Raises:
        InputError: the model cannot be written in this format.
    """
    ends = embeddings or _ends_format(source_folder, round_to)
    config = load_config(str(source_folder))
    tokenizer = load_tokenizer(source_folder)
    # tensors are kept in a temporary file instead of memory until the header is complete
    writer = GGUFWriter(folder / f"{title}.gguf", architecture_of(source_folder, config).name, use_temp_file=True)
    try:
        writer.add_name(title)
        add_model(writer, config)
        add_vocabulary(writer, tokenizer, config)
        written = _add_tensors(writer, _blocks(source_folder, round_to, ends))
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
    num_tensors = _read_back(folder / f"{title}.gguf", _blocks(source_folder, round_to, ends))
    cache = cache_type(config)
    (folder / "Modelfile").write_text(_modelfile(title, tokenizer, config.max_position_embeddings, cache))
    if embeddings and written.ends_from_codes:
        raise InputError(
            f"{source_folder}: the embeddings are low-bit already; remove embeddings from the target, and their codes "
            "are written"
        )
    return [
        *written.notes(round_to),
        *_input_notes(config),
        *cache_notes(source_folder, f"so run it with `-fa on --cache-type-k {cache} --cache-type-v {cache}`"),
        f"read back: all {num_tensors} tensors of the file are bitwise equal to the model's",
    ]


def _ends_format(source_folder: Path, round_to: str | None) -> str:
    """The format of embeddings and head without codes: q8_0 where most layers have 4 bits or fewer, else f16."""
    bits = Counter(bits_of(source_folder).values()).most_common(1)
    is_few = bits[0][0] <= FEW_BITS if bits else round_to == "q4_0"
    width = load_config(str(source_folder)).hidden_size
    return "q8_0" if is_few and width % BLOCK == 0 else "f16"


def _blocks(source_folder: Path, round_to: str | None, embeddings: str) -> Iterator[tuple[str, FileTensor]]:
    """(llama.cpp's name, weight as stored) of every tensor."""
    config = load_config(str(source_folder))
    architecture = architecture_of(source_folder, config)
    name_of = tensor_names(architecture, config)
    if round_to and bits_of(source_folder):
        raise InputError(
            f"{source_folder}: the weights are low-bit already; remove round_to, and their codes are written"
        )
    if factors := rope_factors(config):
        yield "rope_freqs.weight", plain_blocks("rope_freqs", torch.tensor(factors), "f32")
    for key, weight in stored_weights(source_folder):
        if key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and config.tie_word_embeddings):
            continue  # llama.cpp computes inv_freq itself, and uses the embeddings as a tied head
        name, weight = name_of(key), in_order(key, weight, architecture, config)
        if isinstance(weight, Codes):
            blocks: FileTensor = code_blocks(key, weight)
        elif weight.ndim == 1:
            blocks = plain_blocks(key, weight, "f32")
        else:
            blocks = plain_blocks(key, weight, embeddings if name in ENDS else round_to or "f16")
        yield name, blocks


def _input_notes(config: Any) -> list[str]:
    """A line on the activation quantizer that the model was trained with, which the file cannot store."""
    groups = (getattr(config, "quantization_config", None) or {}).get("config_groups", {}).values()
    if not any(group.get("input_activations") for group in groups):
        return []
    return [
        "activations: the trained activation quantizer is not stored; llama.cpp rounds inputs to 8 bits in "
        "blocks of 32 "
        "or 256"
    ]


class _Written:
    """Counts of what was written: formats of layers, of embeddings and head, of both from codes, and moved scales."""

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.from_codes = self.ends_from_codes = self.moved_scales = 0

    def notes(self, round_to: str | None) -> list[str]:
        """The counts as lines of text."""
        layers = ", ".join(f"{count} as {kind}" for kind, count in self.formats.most_common())
        how = "rounded to nearest by the exporter, after training" if round_to else "as trained"
        is_rounded = not self.ends_from_codes and not {*self.ends} <= {"F16", "F32"}
        ends = "from their codes" if self.ends_from_codes else "rounded by the exporter, after training"
        notes = [
            f"layers: {layers}, {how}" + (f"; {self.from_codes} from their codes" if self.from_codes else ""),
            f"embeddings and head: {', '.join(self.ends)}"
            + (f", {ends}" if self.ends_from_codes or is_rounded else ""),
        ]
        if self.moved_scales:
            notes.append(f"{self.moved_scales} scales are too small to be exact in fp16 and were rounded")
        return notes


def _add_tensors(writer: Any, tensors: Iterator[tuple[str, FileTensor]]) -> _Written:
    written = _Written()
    for name, blocks in tensors:
        writer.add_tensor(name, blocks.data, raw_dtype=GGMLQuantizationType[blocks.format])
        if name in ENDS:
            written.ends[blocks.format] += 1
        elif blocks.data.ndim > 1:
            written.formats[blocks.format] += 1
        written.from_codes += blocks.from_codes and name not in ENDS
        written.ends_from_codes += blocks.from_codes and name in ENDS
        written.moved_scales += blocks.moved_scales
    return written


def _read_back(file: Path, tensors: Iterator[tuple[str, FileTensor]]) -> int:
    """Compare every tensor of the file, as decoded by the gguf package, with the values that it should have.

    Returns:
        Number of tensors.

    Raises:
        DistillError: a tensor is not bitwise equal.
    """
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for name, blocks in tensors:
        tensor = stored.pop(name, None)
        if tensor is None or not numpy.array_equal(
            quants.dequantize(tensor.data, tensor.tensor_type).reshape(blocks.values.shape), blocks.values
        ):
            raise DistillError(f"{file}: tensor {name} differs from what was written; check the disk, and export again")
    if stored:
        raise DistillError(f"{file}: contains tensors that were not written: {', '.join(stored)}; export again")
    return len(GGUFReader(file).tensors)


def _modelfile(title: str, tokenizer: PreTrainedTokenizerFast, context_tokens: int, cache: str | None) -> str:
    """The file for ``ollama create``. Without a chat template, the model continues the prompt as it is."""
    lines = [f"FROM ./{title}.gguf", f"PARAMETER num_ctx {min(context_tokens, USUAL_CONTEXT)}"]
    if context_tokens > USUAL_CONTEXT:
        lines.append(f"# the model supports up to {context_tokens} tokens; memory grows with num_ctx")
    if cache is not None:  # a Modelfile has no parameter for it
        lines.insert(0, f"# serve it with OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE={cache}")
    return "\n".join([*lines, *([] if tokenizer.chat_template else ['TEMPLATE """{{ .Prompt }}"""'])]) + "\n"
