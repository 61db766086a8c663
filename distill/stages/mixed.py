"""Which layer gets which grid, chosen by what each costs the model alone, within a budget of bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from distill.core.artifact import write_bytes, write_text
from distill.core.spec import Spec
from distill.quantization import QUANTIZERS
from distill.quantization.base import QuantizerSpec
from distill.stages.base import StageContext
from distill.stages.pace import Pace

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from distill.quantization.sensitivity import Sensitivity
    from distill.stages.report_page.plots import Plot

FILE = "sensitivity.json"


class MixedSpec(Spec):
    """Grids beside the stage's quantizer, one of which each layer gets."""

    also: tuple[Annotated[QuantizerSpec, QUANTIZERS], ...] = Field(min_length=1)
    """Other grids that a layer may get, such as [{kind: int_group, bits: 2}, int8_channel]."""
    bits: float = Field(gt=1, le=16)
    """Largest mean of stored bits a weight, scales included, over the quantized linear layers."""
    num_sequences: int = Field(8, ge=1)
    """Calibration sequences on which each layer is quantized alone, once a grid."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> MixedSpec:
        for grid in self.also:
            grid.without_layers()
        return self


def choose_grids(
    context: StageContext, model: PreTrainedModel, quantizer: QuantizerSpec, mixed: MixedSpec
) -> list[tuple[str, QuantizerSpec]]:
    """Scan a plain model, which is left as it was; the scan is kept in the stage's folder with a picture of it.

    Of several processes the first to come scans; the others, and a run that goes on, read what it has found.

    Returns:
        (layer name, grid) of every quantized linear layer.
    """
    from distill.data.packing import alone

    grids = [quantizer, *mixed.also]
    labels = [grid.label() for grid in grids]
    file = context.folder / FILE
    with alone(context.folder):
        if not file.is_file():
            found = _scan(context, model, grids, mixed.num_sequences)
            _write(context, found, labels, mixed.bits)
    rows = json.loads(file.read_text(encoding="utf-8"))
    counts = [f"{sum(row['chosen'] == label for row in rows)} as {label}" for label in labels]
    bits = sum(row["grids"][row["chosen"]]["bits"] * row["weights"] for row in rows)
    bits /= sum(row["weights"] for row in rows)
    context.say(f"{len(rows)} layers scanned: {', '.join(counts)}; {bits:.2f} bits a weight ({FILE})")
    return [(row["layer"], grids[labels.index(row["chosen"])]) for row in rows]


def _scan(
    context: StageContext, model: PreTrainedModel, grids: Sequence[QuantizerSpec], num_sequences: int
) -> list[Sensitivity]:
    from distill.models.load import move
    from distill.quantization.fake_quant import FakeQuantLinear, fake_quant_layers
    from distill.quantization.prepare import prepare, unprepare
    from distill.quantization.sensitivity import sensitivity
    from distill.training.trainer import resolve_device

    move(model, resolve_device(context.session.compute))
    prepare(model, grids[0])
    batches = list(context.session.corpus().calibration_loader(num_sequences=num_sequences, batch_size=4))
    num_layers = sum(isinstance(layer, FakeQuantLinear) for layer in fake_quant_layers(model).values())
    pace = Pace(context, len(batches) * (1 + num_layers * len(grids)), ("scan", "passes"))
    found = sensitivity(model, grids, batches, lambda batch: pace.of(logits_of(model, batch)))
    unprepare(model)
    return found


def _write(context: StageContext, found: Sequence[Sensitivity], labels: Sequence[str], bits: float) -> None:
    """The picture, and last the file by which the others know that both are there."""
    from distill.quantization.sensitivity import choose
    from distill.stages.report_page.sensitivity_plot import sensitivity_plot

    chosen = choose(found, bits)
    rows = [_row(one, labels, chosen[one.layer]) for one in found]
    write_bytes(context.folder / "sensitivity.png", sensitivity_plot(context.name, rows).png)
    write_text(context.folder / FILE, json.dumps(rows, indent=1))


def scan_plot(folder: Path, name: str) -> Plot | None:
    """The picture of a stage's scan; None where nothing was scanned."""
    from distill.stages.report_page.sensitivity_plot import sensitivity_plot

    file = folder / FILE
    return sensitivity_plot(name, json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _row(one: Sensitivity, labels: Sequence[str], chosen: int) -> dict[str, Any]:
    figures = {label: {"kl": one.kl[i], "bits": one.bits[i]} for i, label in enumerate(labels)}
    return {"layer": one.layer, "weights": one.weights, "grids": figures, "chosen": labels[chosen]}


def logits_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a batch's text: [batch, sequence, vocabulary]."""
    from distill.core.batch import model_inputs

    logits: Tensor = model(**model_inputs(batch, model.device), use_cache=False).logits
    return logits
