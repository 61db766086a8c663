"""Which layer gets which grid, chosen by what each costs the model alone, within a budget of bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import TypedDict

from distill.core.artifact import write_bytes, write_text
from distill.core.batch import model_inputs
from distill.core.errors import InputError
from distill.core.run_folder import CHECKPOINTS
from distill.core.stored import read_checked, read_stored, write_checked
from distill.data.packing import file_lock
from distill.evaluation.quality import predictions_of
from distill.models.load import move
from distill.quantization.base import QuantizerSpec
from distill.quantization.fake_quant import FakeQuantLinear, fake_quant_layers
from distill.quantization.prepare import prepare, unprepare
from distill.quantization.sensitivity import Sensitivity, choose, sensitivity
from distill.reporting.plots import Plot
from distill.reporting.sensitivity_plot import sensitivity_plot
from distill.stages.progress_lines import ProgressLines
from distill.stages.quantize.spec import MixedSpec
from distill.stages.session import StageContext
from distill.training.trainer import resolve_device

FILE = "sensitivity.json"


class OnGrid(TypedDict):
    """A layer quantized alone on one grid."""

    kl: float
    bits: float


class Scanned(TypedDict):
    """A layer of a scan: what it costs on each grid, by the grid's label, and the one that it got."""

    layer: str
    weights: int
    grids: dict[str, OnGrid]
    chosen: str


SCAN: TypeAdapter[list[Scanned]] = TypeAdapter(Annotated[list[Scanned], Field(min_length=1)])
KEPT: TypeAdapter[dict[str, list[Scanned]]] = TypeAdapter(dict[str, Annotated[list[Scanned], Field(min_length=1)]])


def choose_grids(
    context: StageContext, model: PreTrainedModel, quantizer: QuantizerSpec, mixed: MixedSpec
) -> list[tuple[str, QuantizerSpec]]:
    """Scan a plain model, which is left as it was; the scan is kept in the stage's folder with a picture of it.

    Of several processes the first to come scans; the others, and a run that goes on, read what it has found. A scan
    that was damaged meanwhile is made again.

    Returns:
        (layer name, grid) of every quantized linear layer.
    """
    grids = [quantizer, *mixed.also]
    labels = [grid.label() for grid in grids]
    with file_lock(context.folder):
        rows = _kept(context.folder / CHECKPOINTS / FILE, labels)
        if rows is None:
            found = _scan(context, model, grids, mixed.num_sequences)
            rows = _write(context, found, labels, mixed.bits)
    counts = [f"{sum(row['chosen'] == label for row in rows)} as {label}" for label in labels]
    bits = sum(row["grids"][row["chosen"]]["bits"] * row["weights"] for row in rows)
    bits /= sum(row["weights"] for row in rows)
    context.say(f"{len(rows)} layers scanned: {', '.join(counts)}; {bits:.2f} bits per weight ({FILE})")
    return [(row["layer"], grids[labels.index(row["chosen"])]) for row in rows]


def _scan(
    context: StageContext, model: PreTrainedModel, grids: Sequence[QuantizerSpec], num_sequences: int
) -> list[Sensitivity]:
    move(model, resolve_device(context.session.compute))
    prepare(model, grids[0])
    batches = list(context.session.corpus().calibration_loader(num_sequences=num_sequences, batch_size=4))
    num_layers = sum(isinstance(layer, FakeQuantLinear) for layer in fake_quant_layers(model).values())
    progress = ProgressLines(context, len(batches) * (1 + num_layers * len(grids)), ("scan", "passes"))
    predictions = predictions_of(model)
    found = sensitivity(model, grids, batches, lambda batch: progress.count(predictions(batch)))
    unprepare(model)
    return found


def _kept(file: Path, labels: Sequence[str]) -> list[Scanned] | None:
    """The scan of another process or an earlier one; None when there is none of these grids, or it is damaged."""
    try:
        rows = read_checked(file, KEPT, "scan anew")["layers"]
    except (InputError, KeyError):
        return None
    return rows if all([*row["grids"]] == [*labels] and row["chosen"] in labels for row in rows) else None


def _write(context: StageContext, found: Sequence[Sensitivity], labels: Sequence[str], bits: float) -> list[Scanned]:
    """The scan and its picture for people, and last the file by which other processes know of it."""
    chosen = choose(found, bits)
    rows = [_row(one, labels, chosen[one.layer]) for one in found]
    write_bytes(context.folder / "sensitivity.png", sensitivity_plot(context.name, rows).png)
    write_text(context.folder / FILE, json.dumps(rows, indent=1))
    write_checked(context.folder / CHECKPOINTS / FILE, {"layers": rows})
    return rows


def scan_plot(file: Path, name: str) -> Plot:
    """The picture of a stage's scan.

    Args:
        file: :data:`FILE` of the stage.
        name: of the stage.

    Raises:
        InputError: it is not what the stage writes.
    """
    rows = read_stored(file, SCAN, f"run stage {name} again")
    return sensitivity_plot(name, rows)


def _row(one: Sensitivity, labels: Sequence[str], chosen: int) -> Scanned:
    figures: dict[str, OnGrid] = {label: {"kl": one.kl[i], "bits": one.bits[i]} for i, label in enumerate(labels)}
    return {"layer": one.layer, "weights": one.weights, "grids": figures, "chosen": labels[chosen]}


def logits_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a batch's text: [batch, sequence, vocabulary]."""
    logits: Tensor = model(**model_inputs(batch, model.device), use_cache=False).logits
    return logits
