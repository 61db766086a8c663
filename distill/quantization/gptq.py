"""Rounding that makes up for its own error: each column's is spread over the columns that are not rounded yet.

For a weight W and the inputs X of its layer over the calibration set, H = X^T X + lambda I and U = the upper Cholesky
factor of H^-1. Column by column, with q the column's codes on the grid,

    error = (W_j - q_j) / U_jj,   W_k -= error * U_jk  for all k > j

which is the least change of the layer's output. The layers of one block are rounded together, on what the blocks
before, rounded already, hand them. It costs a pass over the calibration set a block, up to that block, and no gradient.

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
from distill.quantization.fake_quant import FakeQuantLinear, fake_quant_layers

DAMPING = 0.01
"""lambda, as a share of the mean diagonal of H."""

Forward = Callable[[Mapping[str, Tensor]], Any]


@torch.no_grad()
def gptq(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], forward: Forward) -> list[str]:
    """Round every fake-quantized layer of a prepared model, in place.

    A layer is left with the scale that it was rounded with as ``log_scale``, and with a weight that lies on its grid:
    for shipping. Where the grid learns its scale, so that the model will be trained on, the weight is left where its
    column stood when it was rounded: the codes are the same, and what the rounding took away is not lost.

    Args:
        model: prepared, not trained since.
        batches: the calibration set, read once a block; with ``attention_mask`` where tokens are padding.
        forward: runs the model on a batch.

    Returns:
        Dotted names of the layers.

    Raises:
        InputError: a grid has no one scale to keep while columns move, or no token reached a layer.
    """
    layers = {n: layer for n, layer in fake_quant_layers(model).items() if isinstance(layer, FakeQuantLinear)}
    for name, layer in layers.items():
        if not layer.spec.keeps_scale:
            raise InputError(f"{name}: gptq rounds to symmetric integer grids, not {layer.spec.label()}; use nearest")
    kept, training = list(batches), model.training
    model.eval()
    for layer in layers.values():
        layer.enabled = False
    for _, group in groupby(layers, block_of):
        block = {name: layers[name] for name in group}
        sums = moments(model, block, kept, forward)
        for name, layer in block.items():
            if name not in sums:
                raise InputError(f"{name}: no token of the calibration set reached it, so gptq cannot round it")
            _round(layer, sums[name])
            layer.enabled = True
    model.train(training)
    return list(layers)


class _Enough(Exception):
    """Every layer of a block has seen a batch."""


def block_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj``; the whole name of a layer outside of any."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found.group() if found else name


def moments(
    model: nn.Module, block: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]], forward: Forward
) -> dict[str, Tensor]:
    """X^T X of every layer of a block, fp64, [in_features, in_features]; what comes after the block is not computed."""
    sums: dict[str, Tensor] = {}
    mask: list[Tensor | None] = [None]
    awaited: set[str] = set()

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows, attended = inputs[0], mask[0]
        if attended is not None and attended.shape == rows.shape[:-1]:
            rows = rows[attended.to(rows.device).bool()]
        rows = rows.reshape(-1, rows.shape[-1]).double()
        if len(rows):
            sums[name] = sums.get(name, 0) + rows.T @ rows
        awaited.discard(name)
        if not awaited:
            raise _Enough

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in block.items()]
    try:
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            awaited.update(block)
            with suppress(_Enough):
                forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _round(layer: FakeQuantLinear, moments: Tensor) -> None:
    """Put the rounded weight and its scale into a layer."""
    spec, weight = layer.spec, layer.weight.double().clone()
    factor = _factor(moments)
    size = weight.shape[-1] // spec.groups(weight.shape[-1])
    scales: list[Tensor] = []
    for column in range(weight.shape[-1]):
        if column % size == 0:
            # the group's own scale, of the weights as they have moved so far
            scales.append(spec.quantize(weight[:, column : column + size]).scale[:, 0])
        here, scale = weight[:, column], scales[-1][:, None]
        rounded = spec.dequantize(spec.quantize(here[:, None], scale=scale))[:, 0].double()
        error = (here - rounded) / factor[column, column]
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
    """The upper Cholesky factor of the inverse of X^T X, damped; inputs that are always zero stand for themselves."""
    diagonal = moments.diagonal()
    silent = diagonal == 0
    damped = moments + torch.diag(silent.double() + DAMPING * diagonal.mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
