"""Input channels made alike before anything is rounded: a norm's output is divided by what its readers multiply by.

    y = W diag(s) (diag(1 / s) x),   norm.weight /= s,   W *= s  in every linear layer that reads the norm
    (Gemma's norms multiply by 1 + w:   w = (1 + w) / s - 1)

    awq:           s = mean|x| ^ a,  a of 0, 0.05 ... 1 with the least ||(q(W s) / s - W) X||^2 over the readers
    smooth_quant:  s = max|x| ^ 0.5 / max|W| ^ 0.5, each of an input channel

The model computes what it did before, and no engine has to know. Prefer awq for weights of 4 bits and fewer: channels
that carry much get finer steps. Prefer smooth_quant where activations are int8 too: their outliers move into the
weights, which bear them better. Layers that read no norm (the output of attention, the second half of an MLP) are
left alone, and an even distribution gains nothing.

Source: Lin et al. 2023, arXiv 2306.00978, section 3.2 (awq); Xiao et al. 2022, arXiv 2211.10438, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.quantization.calibrate import watch
from distill.quantization.fake_quant import FakeQuantLinear, fake_quant_layers, unquantized
from distill.quantization.gptq import block_of, moments

Method = Literal["awq", "smooth_quant"]
Logits = Callable[[Mapping[str, Tensor]], Tensor]

STEPS = 20
"""Exponents that awq tries beside 0."""
TOLERANCE = 1e-3
"""Largest change of a logit, as a share of the largest one: rounding of fp32, and no more."""


@torch.no_grad()
def equalize(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], logits: Logits, method: Method) -> list[str]:
    """Fold the scales into norms and linear layers, in place.

    Args:
        model: prepared, not trained since; no grid of it learns its scale, or it is prepared anew afterwards.
        batches: the calibration set; with ``attention_mask`` [batch, sequence] where tokens are padding.
        logits: batch -> [batch, sequence, vocabulary].
        method: how scales are found.

    Returns:
        Dotted names of the norms.

    Raises:
        InputError: no quantized layer reads a norm, or something else that is not a linear layer reads it too.
    """
    kept, training = list(batches), model.training
    model.eval()
    with unquantized(model):
        readers, before = _readers(model, kept[0], logits)
        if not readers:
            raise InputError(f"equalize: {method} has no norm to fold scales into that quantized layers read")
        extents = _extents(model, readers, kept, logits, method)
        for _, names in groupby(readers, block_of):
            _fold_block(model, {name: readers[name] for name in names}, kept, logits, extents, method)
        change = (logits(kept[0]) - before).abs().max() / before.abs().max()
    model.train(training)
    if not change <= TOLERANCE:
        raise InputError(
            f"equalize: the model computes otherwise with scales in its norms (logits move by {change:.1%}): something "
            "else than linear layers reads them, or they multiply by another thing than their weight; remove equalize"
        )
    return list(readers)


def _readers(model: nn.Module, batch: Mapping[str, Tensor], logits: Logits) -> tuple[dict[str, list[str]], Tensor]:
    """Norm -> linear layers that read its very output, where one of them is quantized; and the batch's logits."""
    made: dict[int, tuple[str, Tensor]] = {}  # with the tensor, so that no other gets its place in memory
    readers: dict[str, list[str]] = {}

    def note_output(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made[id(output)] = (name, output)

    def note_input(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made:
            readers.setdefault(made[id(inputs[0])][0], []).append(name)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(partial(note_input, name)))
        elif getattr(getattr(module, "weight", None), "ndim", 0) == 1:
            handles.append(module.register_forward_hook(partial(note_output, name)))
    try:
        before = logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    quantized = fake_quant_layers(model)
    return {norm: names for norm, names in readers.items() if any(name in quantized for name in names)}, before


def _extents(
    model: nn.Module, readers: Mapping[str, Sequence[str]], batches: Any, logits: Logits, method: Method
) -> dict[str, Tensor]:
    """Largest (smooth_quant) or mean magnitude of every norm's channels, fp32."""
    first = {names[0]: norm for norm, names in readers.items()}
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str, rows: Tensor) -> None:
        norm, size = first[name], rows.abs()
        if method == "smooth_quant":
            found[norm] = torch.maximum(found.get(norm, size.amax(0)), size.amax(0))
        else:
            found[norm] = found.get(norm, 0) + size.sum(0)
            counts[norm] = counts.get(norm, 0) + len(rows)

    watch(model, {name: model.get_submodule(name) for name in first}, batches, logits, note)
    return {norm: extent / counts.get(norm, 1) for norm, extent in found.items()}


def _fold_block(
    model: nn.Module, readers: Mapping[str, Sequence[str]], batches: Any, logits: Logits, extents: Any, method: Method
) -> None:
    """Find and fold the scales of one block's norms."""
    sums: dict[str, Tensor] = {}
    if method == "awq":
        sums = moments(model, {names[0]: model.get_submodule(names[0]) for names in readers.values()}, batches, logits)
    for norm, names in readers.items():
        layers = [model.get_submodule(name) for name in names]
        if method == "awq":
            scale = _searched(layers, extents[norm], sums[names[0]].float())
        else:
            largest = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0).float()  # type: ignore[operator]
            scale = (extents[norm] / largest).sqrt()
        _fold(model.get_submodule(norm), layers, _sound(scale))


def _searched(layers: Sequence[Any], extent: Tensor, sums: Tensor) -> Tensor:
    """The power of the channels' magnitudes that costs the layers' outputs least."""
    best, least = torch.ones_like(extent), float("inf")
    for step in range(STEPS + 1):
        scale = _sound(extent ** (step / STEPS))
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = sum(float(_error(layer, scale, sums)) for layer in layers if isinstance(layer, FakeQuantLinear))
        if error < least:
            best, least = scale, error
    return best


def _error(layer: FakeQuantLinear, scale: Tensor, sums: Tensor) -> Tensor:
    """||(q(W s) / s - W) X||^2, by X X^T."""
    weight = layer.weight.float()
    moved = layer.spec.dequantize(layer.spec.quantize(weight * scale)) / scale - weight
    return ((moved @ sums) * moved).sum()


def _sound(scale: Tensor) -> Tensor:
    """1 for a channel that is always zero, or whose weights are."""
    return scale.masked_fill(~scale.isfinite() | (scale <= 0), 1.0)


def _fold(norm: Any, layers: Sequence[Any], scale: Tensor) -> None:
    offset = _offset(norm)
    norm.weight.copy_((norm.weight + offset) / scale - offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(scale)
    for layer in layers:
        layer.weight.mul_(scale)


def _offset(norm: Any) -> float:
    """What a norm adds to its weight before it multiplies: 1 in Gemma's, which store ``w - 1``, and else 0."""
    kept = {name: parameter.clone() for name, parameter in norm.named_parameters()}
    probe = torch.linspace(1, 2, len(norm.weight), device=norm.weight.device, dtype=norm.weight.dtype)
    try:
        for parameter in norm.parameters():
            parameter.zero_()
        return float(bool(norm(probe[None, None]).any()))
    finally:
        for name, parameter in norm.named_parameters():
            parameter.copy_(kept[name])
