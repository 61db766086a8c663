"""Which layer gets which grid, chosen by what each costs the model alone, within a budget of bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from distill.core.artifact import write_bytes, write_text
from distill.core.spec import Spec
from distill.quantization import QUANTIZERS
from distill.quantization.base import QuantizerSpec
from distill.stages.base import StageContext

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FILE = "sensitivity.json"


class MixedSpec(Spec):
    """Grids beside the stage's quantizer, one of which each layer gets."""

    also: tuple[Annotated[QuantizerSpec, QUANTIZERS], ...] = Field(min_length=1)
    """Other grids that a layer may get, such as [{kind: int_group, bits: 2}, int8_channel]."""
    bits: float = Field(gt=1, le=16)
    """Largest mean of stored bits a weight, scales included, over the quantized linear layers."""
    num_sequences: int = Field(8, ge=1)
    """Calibration sequences on which each layer is quantized alone, once a grid."""


def choose_grids(
    context: StageContext, model: PreTrainedModel, quantizer: QuantizerSpec, mixed: MixedSpec
) -> list[tuple[str, QuantizerSpec]]:
    """Scan a plain model, which is left as it was; the scan is kept in the stage's folder with a picture of it.

    Returns:
        (layer name, grid) of every quantized linear layer.
    """
    from distill.models.load import move
    from distill.quantization.prepare import prepare, unprepare
    from distill.quantization.sensitivity import choose, sensitivity
    from distill.stages.report_page.sensitivity_plot import sensitivity_plot
    from distill.training.trainer import resolve_device

    grids = [quantizer, *mixed.also]
    corpus = context.session.corpus()
    move(model, resolve_device(context.session.compute))
    prepare(model, quantizer)
    batches = list(corpus.calibration_loader(num_sequences=mixed.num_sequences, batch_size=4))
    found = sensitivity(model, grids, batches, partial(_logits, model))
    unprepare(model)
    chosen = choose(found, mixed.bits)
    labels = [grid.label() for grid in grids]
    rows = [_row(one, labels, chosen[one.layer]) for one in found]
    write_text(context.folder / FILE, json.dumps(rows, indent=1))
    write_bytes(context.folder / "sensitivity.png", sensitivity_plot(context.name, rows).png)
    bits = sum(one.bits[chosen[one.layer]] * one.weights for one in found) / sum(one.weights for one in found)
    counts = [f"{sum(i == index for i in chosen.values())} as {label}" for index, label in enumerate(labels)]
    context.say(f"{len(found)} layers scanned: {', '.join(counts)}; {bits:.2f} bits a weight ({FILE})")
    return [(one.layer, grids[chosen[one.layer]]) for one in found]


def _row(one: Any, labels: Sequence[str], chosen: int) -> dict[str, Any]:
    figures = {label: {"kl": one.kl[i], "bits": one.bits[i]} for i, label in enumerate(labels)}
    return {"layer": one.layer, "weights": one.weights, "grids": figures, "chosen": labels[chosen]}


def _logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    from distill.core.batch import model_inputs

    logits: Tensor = model(**model_inputs(batch, model.device), use_cache=False).logits
    return logits
