"""Calibration of static activation scales on the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.quantization.fake_quant import InputQuantLinear, unquantized
from distill.quantization.inputs import HIGH, LOW, STEPS
from distill.quantization.static_int8 import StaticInt8

BINS = 2048
PERCENTILE = 0.999
"""Fraction of the activations inside the range of the ``percentile`` observer."""
BASE_LAYER_SUFFIX = ".base_layer"
"""Suffix that peft adds to the name of a layer that it wraps."""
DECAY = 0.9
"""Decay of the moving average per sequence."""

Forward = Callable[[Mapping[str, Tensor]], Any]
Watch = Callable[[str, Tensor], None]


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], forward: Forward) -> dict[str, float]:
    """Set ``input_scale`` of every layer with static activation quantization, in place.

    The model reads the batches in full precision and in evaluation mode: once for the largest magnitudes, and a second
    time for histograms if an observer needs them. Histograms do not depend on the batch size.

    Args:
        model: prepared, with ``static_int8`` activations on some layers, and with adapters if they are absorbed
            (:func:`~distill.quantization.lora.absorb_lora`). Without such layers nothing is done.
        batches: read up to twice; with ``attention_mask`` [batch, sequence] if there is padding.
        forward: runs the model on a batch.

    Returns:
        Dotted layer name -> scale.

    Raises:
        InputError: no token reached a layer, or an activation is not finite.
    """
    layers = {
        name.removesuffix(BASE_LAYER_SUFFIX): module
        for name, module in model.named_modules()
        if isinstance(module, InputQuantLinear) and _observer(module) is not None
    }
    if not layers:
        return {}
    # an absorbed adapter computes instead of its layer and never calls it, so the hook is on the adapter: same input
    called = {name: model.get_submodule(name) for name in layers}
    kept = list(batches)
    largest: dict[str, Tensor] = {}
    average: dict[str, Tensor] = {}

    def note_largest(name: str, rows: Tensor) -> None:
        peak = rows.abs().amax()
        largest[name] = torch.maximum(largest.get(name, peak), peak)
        average[name] = DECAY * average[name] + (1 - DECAY) * peak if name in average else peak

    watch(model, called, kept, forward, note_largest)
    for name in layers:
        if name not in largest or not largest[name].isfinite():
            raise InputError(
                f"{name}: no finite input activation in the calibration set, so the layer has no range; check that the "
                "data reaches the layer, and the model's weights"
            )
    counts: dict[str, Tensor] = {}

    def note_histogram(name: str, rows: Tensor) -> None:
        end = largest[name].clamp(min=torch.finfo(torch.float32).tiny)
        bins = (rows.abs() / end * BINS).long().clamp(max=BINS - 1).flatten()
        counts[name] = counts.get(name, 0) + torch.bincount(bins, minlength=BINS)

    drawn = {name: called[name] for name, layer in layers.items() if _observer(layer) in ("percentile", "mse")}
    if drawn:
        watch(model, drawn, kept, forward, note_histogram)
    scales: dict[str, float] = {}
    for name, layer in layers.items():
        extent = average[name] if _observer(layer) == "moving_average" else largest[name]
        if name in drawn:
            extent = largest[name] * _range_fraction(counts[name], str(_observer(layer)))
        scale = (extent / STEPS).bfloat16().float()  # rounded to the type in which it is stored
        layer.input_scale = scale.masked_fill(scale == 0, 1.0).reshape(1)
        scales[name] = layer.input_scale.item()
    return scales


def _observer(layer: InputQuantLinear) -> str | None:
    return layer.inputs.observer if isinstance(layer.inputs, StaticInt8) else None


def _range_fraction(counts: Tensor, observer: str) -> float:
    """The range as a fraction of the largest magnitude.

    Args:
        counts: histogram of the magnitudes from 0 to the largest, [BINS].
        observer: ``percentile`` or ``mse``.
    """
    share = counts.double() / counts.sum()
    if observer == "percentile":
        return float((share.cumsum(0) < PERCENTILE).sum() + 1) / BINS
    middles = (torch.arange(BINS, device=counts.device).double() + 0.5) / BINS
    tries = [step / 100 for step in range(1, 101)]
    errors = []
    for extent in tries:
        scale = extent / STEPS
        rounded = (middles / scale).round().clamp(LOW, HIGH) * scale
        errors.append(float(((rounded - middles).square() * share).sum()))
    return tries[errors.index(min(errors))]


def watch(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    forward: Forward,
    note: Watch,
) -> None:
    """Call ``note`` with the input of every layer for every sequence, without padding: fp32 [tokens, in_features]."""
    mask: list[Tensor | None] = [None]

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().float()
        attended = mask[0]
        if attended is None or attended.shape != rows.shape[:-1]:
            for sequence in rows.reshape(-1, *rows.shape[-2:]) if rows.ndim > 2 else [rows]:
                note(name, sequence)
            return
        for sequence, real in zip(rows, attended.to(rows.device).bool(), strict=True):
            if real.any():
                note(name, sequence[real])

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in layers.items()]
    training = model.training
    try:
        model.eval()
        with unquantized(model):
            for batch in stoppable(batches):
                mask[0] = batch.get("attention_mask")
                forward(batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
