"""Equalisation of input channels before quantization: the output of a norm is divided by a scale per channel, and the
weights of the linear layers that read it are multiplied by the same scale.

    y = W diag(s) (diag(1 / s) x),   norm.weight /= s,   W *= s  in every linear layer that reads the norm
    (Gemma's norms multiply by 1 + w:   w = (1 + w) / s - 1)

    awq:           s = mean|x| ^ a,  with the a of 0, 0.05, ..., 1 that minimises ||(q(W s) / s - W) X||^2
    smooth_quant:  s = max|x| ^ 0.5 / max|W| ^ 0.5, both per input channel

The function of the model does not change, so engines need no support for it. Prefer awq for weights of 4 bits and
fewer: channels with large activations get a finer quantization. Prefer smooth_quant if activations are int8 too: it
moves outliers from the activations to the weights, which tolerate them better. Layers whose input is not the output of
a norm (attention output and MLP down projections) are not changed. Activations without outlier channels gain nothing.

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
from distill.core.stop import stoppable
from distill.quantization.calibrate import watch
from distill.quantization.fake_quant import FakeQuantLinear, fake_quant_layers, unquantized
from distill.quantization.gptq import block_of, moments

Method = Literal["awq", "smooth_quant"]
Logits = Callable[[Mapping[str, Tensor]], Tensor]

STEPS = 20
"""Number of exponents that awq tries, in addition to 0."""
TOLERANCE = 1e-3
"""Allowed change of a logit, as a fraction of the largest logit: it covers rounding errors in fp32."""


@torch.no_grad()
def equalize(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], logits: Logits, method: Method) -> list[str]:
    """Compute the scales and fold them into norms and linear layers, in place.

    Args:
        model: prepared and not yet trained. If a quantizer learns its scale, prepare the model again afterwards.
        batches: the calibration set; with ``attention_mask`` [batch, sequence] if there is padding.
        logits: batch -> [batch, sequence, vocabulary].
        method: how the scales are computed.

    Returns:
        Dotted names of the norms.

    Raises:
        InputError: no quantized layer reads a norm, or a module that is not a linear layer reads the norm as well.
    """
    kept, training = list(batches), model.training
    model.eval()
    with unquantized(model):
        readers, before = _readers(model, kept[0], logits)
        if not readers:
            raise InputError(
                f"equalize: {method} folds scales into the norms that quantized linear layers read, and this model has "
                "none; remove equalize"
            )
        extents = _extents(model, readers, kept, logits, method)
        for _, names in groupby(readers, block_of):
            _fold_block(model, {name: readers[name] for name in names}, kept, logits, extents, method)
        change = (logits(kept[0]) - before).abs().max() / before.abs().max()
    model.train(training)
    if not change <= TOLERANCE:
        raise InputError(
            f"equalize: scales in the norms change the model's output (logits by {change:.1%}, expected at most "
            f"{TOLERANCE:.1%}): another module than a linear layer reads a norm, or a norm does not multiply by its "
            "weight; remove equalize"
        )
    return list(readers)


def _readers(model: nn.Module, batch: Mapping[str, Tensor], logits: Logits) -> tuple[dict[str, list[str]], Tensor]:
    """(norm -> linear layers that read its output, if at least one of them is quantized; logits of the batch)."""
    made: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors alive, so that an id is not reused
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
    """Largest (smooth_quant) or mean (awq) magnitude of each channel, per norm: fp32 [channels]."""
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
    """Compute and fold the scales of the norms of one transformer block."""
    sums: dict[str, Tensor] = {}
    if method == "awq":
        sums = moments(model, {names[0]: model.get_submodule(names[0]) for names in readers.values()}, batches, logits)
    for norm, names in readers.items():
        layers = [model.get_submodule(name) for name in names]
        if method == "awq":
            scale = _search_scale(layers, extents[norm], sums[names[0]].float())
        else:
            # largest magnitude per input channel over all readers, [channels]
            largest = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0).float()  # type: ignore[operator]
            scale = (extents[norm] / largest).sqrt()
        _fold(model.get_submodule(norm), layers, _replace_invalid(scale))


def _search_scale(layers: Sequence[Any], extent: Tensor, sums: Tensor) -> Tensor:
    """The power of ``extent`` with the smallest output error, [channels].

    Args:
        layers: the linear layers that read the norm.
        extent: mean magnitude per channel, [channels].
        sums: X X^T, [channels, channels].
    """
    best, least = torch.ones_like(extent), float("inf")
    for step in stoppable(range(STEPS + 1)):
        scale = _replace_invalid(extent ** (step / STEPS))
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = sum(float(_error(layer, scale, sums)) for layer in layers if isinstance(layer, FakeQuantLinear))
        if error < least:
            best, least = scale, error
    return best


def _error(layer: FakeQuantLinear, scale: Tensor, sums: Tensor) -> Tensor:
    """||D X||^2 = sum((D X X^T) * D) with D = q(W s) / s - W and ``sums`` = X X^T."""
    weight = layer.weight.float()
    difference = layer.spec.dequantize(layer.spec.quantize(weight * scale)) / scale - weight  # [out, in]
    return ((difference @ sums) * difference).sum()


def _replace_invalid(scale: Tensor) -> Tensor:
    """The scale, with 1 for channels whose activations or weights are all zero."""
    return scale.masked_fill(~scale.isfinite() | (scale <= 0), 1.0)


def _fold(norm: Any, layers: Sequence[Any], scale: Tensor) -> None:
    offset = _offset(norm)
    norm.weight.copy_((norm.weight + offset) / scale - offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(scale)
    for layer in layers:
        layer.weight.mul_(scale)


def _offset(norm: Any) -> float:
    """The constant that a norm adds to its weight: 1 in Gemma, which stores ``w - 1``, and 0 elsewhere.

    Found by a forward pass with all parameters zero: the output is nonzero only if a constant is added.
    """
    kept = {name: parameter.clone() for name, parameter in norm.named_parameters()}
    probe = torch.linspace(1, 2, len(norm.weight), device=norm.weight.device, dtype=norm.weight.dtype)
    try:
        for parameter in norm.parameters():
            parameter.zero_()
        return float(bool(norm(probe[None, None]).any()))
    finally:
        for name, parameter in norm.named_parameters():
            parameter.copy_(kept[name])
