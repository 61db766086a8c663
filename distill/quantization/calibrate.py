"""The ranges of a model's activations, from the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.quantization.fake_quant import InputQuantLinear, unquantized
from distill.quantization.inputs import HIGH, LOW, STEPS
from distill.quantization.static_int8 import StaticInt8

BINS = 2048
KEPT = 0.999
"""Share of the activations that a percentile leaves inside."""
ADAPTED = ".base_layer"
"""What peft appends to the name of a layer that it wraps."""
DECAY = 0.9
"""Of the moving average, a sequence."""

Forward = Callable[[Mapping[str, Tensor]], Any]
Watch = Callable[[str, Tensor], None]


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], forward: Forward) -> dict[str, float]:
    """Set ``input_scale`` of every layer whose activations have a static grid, in place.

    The model reads the batches in full precision and in evaluation mode: once for the largest magnitudes, and once
    more, where an observer asks for it, for histograms, which do not depend on how the data is batched.

    Args:
        model: prepared, with ``static_int8`` activations on some layers, and with adapters if they are absorbed
            (:func:`~distill.quantization.lora.absorb_lora`); nothing is done without.
        batches: read twice; with ``attention_mask`` [batch, sequence] where tokens are padding.
        forward: runs the model on a batch.

    Returns:
        Dotted layer name -> scale.

    Raises:
        InputError: no token reached a layer, or an activation is not finite.
    """
    layers = {
        name.removesuffix(ADAPTED): module
        for name, module in model.named_modules()
        if isinstance(module, InputQuantLinear) and _observer(module) is not None
    }
    if not layers:
        return {}
    # an absorbed adapter multiplies in its layer's stead and never calls it, but is called with the same input
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
            raise InputError(f"{name}: no finite activation in the calibration set to take a range from")
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
            extent = largest[name] * _share(counts[name], str(_observer(layer)))
        scale = (extent / STEPS).bfloat16().float()  # as it may be stored
        layer.input_scale = scale.masked_fill(scale == 0, 1.0).reshape(1)
        scales[name] = layer.input_scale.item()
    return scales


def _observer(layer: InputQuantLinear) -> str | None:
    return layer.inputs.observer if isinstance(layer.inputs, StaticInt8) else None


def _share(counts: Tensor, observer: str) -> float:
    """The range as a share of the largest magnitude, from a histogram of the magnitudes up to it."""
    share = counts.double() / counts.sum()
    if observer == "percentile":
        return float((share.cumsum(0) < KEPT).sum() + 1) / BINS
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
    """Hand every sequence's input of every layer to ``note``, without its padding: [tokens, in_features], fp32."""
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
            for batch in batches:
                mask[0] = batch.get("attention_mask")
                forward(batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
