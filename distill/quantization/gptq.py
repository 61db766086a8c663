"""GPTQ: the rounding error of each column is compensated by the columns that are not rounded yet.

For a weight W and the inputs X [tokens, in] of its layer on the calibration set, let H = X^T X + lambda I and U the
upper Cholesky factor of H^-1. For each column j in order, with q_j the column rounded to the grid,

    error = (W_j - q_j) / U_jj,   W_k -= error * U_jk  for all k > j

which minimises the change of the layer's output. The layers of one transformer block are rounded together, with inputs
from the blocks before it, which are already rounded. The cost is one pass over the calibration set per block, up to
that block, and no gradients.

Source: Frantar et al. 2022, arXiv 2210.17323, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.quantization.fake_quant import FakeQuantLinear, fake_quant_layers

DAMPING = 0.01
"""lambda, as a fraction of the mean diagonal of X^T X."""

Forward = Callable[[Mapping[str, Tensor]], Any]


@torch.no_grad()
def gptq(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], forward: Forward) -> list[str]:
    """Round every fake-quantized linear layer of a prepared model, in place, except a head with a grid of its own.

    Afterwards ``log_scale`` of a layer is the scale that was used, and its weight is on the grid. A quantizer that
    learns its scale is an exception, because the model will be trained further: there each column keeps its value from
    just before it was rounded. It has the same code, and its full-precision value is preserved for training.

    Args:
        model: prepared and not yet trained.
        batches: the calibration set, read once per block; with ``attention_mask`` if there is padding.
        forward: runs the model on a batch.

    Returns:
        Dotted names of the layers.

    Raises:
        InputError: a quantizer cannot quantize with a given scale, or no token reached a layer.
    """
    every = fake_quant_layers(model)
    layers = {n: layer for n, layer in every.items() if isinstance(layer, FakeQuantLinear) and not layer.is_end}
    for name, layer in layers.items():
        if not layer.spec.keeps_scale:
            raise InputError(
                f"{name}: rounding: gptq supports symmetric integer quantizers (got {layer.spec.label()}); "
                "use rounding: nearest"
            )
    kept, training = list(batches), model.training
    model.eval()
    for layer in layers.values():
        layer.enabled = False
    for _, group in groupby(layers, block_of):
        block = {name: layers[name] for name in group}
        sums = moments(model, block, kept, forward)
        for name, layer in stoppable(block.items()):
            if name not in sums:
                raise InputError(
                    f"{name}: rounding: gptq needs inputs, but no token of the calibration set reached this layer; add "
                    "it to skip, or use rounding: nearest"
                )
            _round(layer, sums[name])
            layer.enabled = True
    model.train(training)
    return list(layers)


class _StopForward(Exception):
    """Raised by a hook to end a forward pass once every layer of a block has its input."""


def block_of(name: str) -> str:
    """The block of a layer: ``model.layers.3`` for ``model.layers.3.mlp.up_proj``; else the name itself."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found.group() if found else name


def moments(
    model: nn.Module, block: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]], forward: Forward
) -> dict[str, Tensor]:
    """X^T X of the inputs of every layer of a block, fp64 [in_features, in_features]; passes end after the block."""
    sums: dict[str, Tensor] = {}
    mask: list[Tensor | None] = [None]
    awaited: set[str] = set()

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows, attended = inputs[0], mask[0]
        if attended is not None and attended.shape == rows.shape[:-1]:
            rows = rows[attended.to(rows.device).bool()]
        rows = rows.reshape(-1, rows.shape[-1]).double()  # [tokens, in_features]
        if len(rows):
            sums[name] = sums.get(name, 0) + rows.T @ rows
        awaited.discard(name)
        if not awaited:
            raise _StopForward

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in block.items()]
    try:
        for batch in stoppable(batches):
            mask[0] = batch.get("attention_mask")
            awaited.update(block)
            with suppress(_StopForward):
                forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _round(layer: FakeQuantLinear, moments: Tensor) -> None:
    """Round the weight of a layer and set its scale, in place; ``moments`` is X^T X, [in_features, in_features]."""
    spec, weight = layer.spec, layer.weight.double().clone()  # [out_features, in_features]
    factor = _factor(moments)  # U, [in_features, in_features]
    size = weight.shape[-1] // spec.groups(weight.shape[-1])
    scales: list[Tensor] = []
    for column in range(weight.shape[-1]):
        if column % size == 0:
            # the scale of a group is computed from its weights after the compensation so far
            scales.append(spec.quantize(weight[:, column : column + size]).scale[:, 0])  # [out_features]
        current, scale = weight[:, column], scales[-1][:, None]  # [out_features], [out_features, 1]
        rounded = spec.dequantize(spec.quantize(current[:, None], scale=scale))[:, 0].double()
        error = (current - rounded) / factor[column, column]  # [out_features]
        weight[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
        if layer.log_scale is None:
            weight[:, column] = rounded
    layer.weight.copy_(weight)
    scale = torch.stack(scales, 1).double().log().float().flatten()
    if layer.log_scale is None:
        layer.log_scale = nn.Parameter(scale, requires_grad=False)
    else:
        layer.log_scale.copy_(scale)


def _factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped X^T X.

    An input that is always zero gets a 1 on the diagonal, so that it exchanges no error with the others.
    """
    diagonal = moments.diagonal()
    unused = diagonal == 0
    damped = moments + torch.diag(unused.double() + DAMPING * diagonal.mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
