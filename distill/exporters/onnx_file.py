"""Write a model folder as an ONNX graph with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel

from distill.exporters.base import cache_notes
from distill.exporters.deliver import copy_files
from distill.exporters.onnx_embeddings import end_names, round_ends
from distill.exporters.onnx_graph import num_layers, quantize_graph, quiet, write_decoder, write_graph
from distill.exporters.onnx_names import FILE
from distill.exporters.stored_weights import bits_of, stored_weights
from distill.models.load import Task, load_model
from distill.quantization.base import Codes


def write(
    source_folder: Path, folder: Path, *, rounds: bool, rounds_ends: bool, caches: bool, tasks: Sequence[Task]
) -> list[str]:
    """Write the export, without a model card; see :meth:`~distill.exporters.base.ExporterSpec.export`.

    Args:
        source_folder: the model's folder.
        folder: an empty folder.
        rounds: whether ONNX Runtime rounds the linear layers to int8.
        rounds_ends: whether embeddings and head are stored as 8-bit codes.
        caches: whether the KV cache is an input and output of the graph.
        tasks: the supported tasks of the model.

    Raises:
        InputError: torch cannot export the model, or a file is a link to outside of the folder.
    """
    _copy_the_rest(source_folder, folder)  # first, as a file that may not be copied is refused here
    model = load_model(str(source_folder), dtype="float32", tasks=tasks)
    outer = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    low_bit = sum(id(model.get_submodule(name)) not in outer for name in bits_of(source_folder))
    with quiet(), TemporaryDirectory(dir=folder) as temporary:
        plain = Path(temporary) if rounds else folder
        if caches:
            write_decoder(model, plain / FILE)
        else:
            write_graph(model, plain / FILE)
        if rounds:
            quantize_graph(plain / FILE, folder / FILE, num_layers(model))
        from_codes = round_ends(model, _codes_of_ends(source_folder, model), folder / FILE) if rounds_ends else 0
    cache = cache_notes(source_folder, "which this graph does not have; its keys and values are not rounded")
    ends = "float32"
    if rounds_ends:
        ends = "8 bits, from their codes" if from_codes else "int8 per row, rounded by the exporter, after training"
    if not rounds:
        codes = f"; {low_bit} layers have the dequantized values of their codes" * bool(low_bit)
        every = "all weights in float32" if not rounds_ends else f"embeddings and head: {ends}; all others in float32"
        return [f"{every}{codes}", *cache]
    again = f"; {low_bit} layers were low-bit already and are rounded a second time" if low_bit else ""
    return [
        f"linear layers: int8 per channel, activations uint8, rounded by ONNX Runtime after training{again}; "
        f"embeddings and head: {ends}",
        *cache,
    ]


def _codes_of_ends(source_folder: Path, model: PreTrainedModel) -> dict[str, Codes]:
    """The trained codes of embeddings and head, by the name of the weight."""
    wanted = {*end_names(model)}
    if not bits_of(source_folder):
        return {}
    return {key: weight for key, weight in stored_weights(source_folder) if key in wanted and isinstance(weight, Codes)}


def _copy_the_rest(source_folder: Path, folder: Path) -> None:
    """Copy tokenizer and config, without the config's section on the low-bit weights, which are not copied."""
    copy_files(source_folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
