"""What each layer alone costs on each grid, and the grids that cost the least within a budget of bits.

    loss(layer, grid) = mean over tokens of KL(full precision || that layer alone on that grid)

The choice starts with every layer on its cheapest grid and takes, again and again, the change that saves the most loss
a bit, until no change fits: the losses of single layers are taken to add up, which holds while they are small.

Source: Dong et al. 2019, arXiv 1911.03852 (sensitivity decides precision; there by the Hessian); the greedy choice is
that of the knapsack's relaxation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.quantization.base import QuantizerSpec
from distill.quantization.fake_quant import FakeQuantLinear, fake_quant_layers, switch

Logits = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """One layer on every grid.

    Attributes:
        layer: dotted name.
        weights: how many it has.
        kl: for each grid, mean KL of a token to the model in full precision, nats.
        bits: for each grid, stored bits a weight, scales included.
    """

    layer: str
    weights: int
    kl: tuple[float, ...]
    bits: tuple[float, ...]


@torch.no_grad()
def sensitivity(
    model: nn.Module, grids: Sequence[QuantizerSpec], batches: Iterable[Mapping[str, Tensor]], logits: Logits
) -> list[Sensitivity]:
    """Quantize each linear layer alone on each grid: a pass over the batches a layer and grid; the model stays.

    Args:
        model: prepared, with any grid.
        grids: to try; none may learn its scale.
        batches: ``input_ids`` and ``mask``, [batch, sequence]; tokens count where the mask is True.
        logits: batch -> [batch, sequence, vocabulary].

    Raises:
        InputError: no token counts, or a grid does not fit a layer.
    """
    layers = {n: layer for n, layer in fake_quant_layers(model).items() if isinstance(layer, FakeQuantLinear)}
    kept = {name: (layer.spec, layer.inputs) for name, layer in layers.items()}
    sums, count = {name: [0.0] * len(grids) for name in layers}, 0
    training = model.training
    try:
        model.eval()
        switch(model, enabled=False)
        for batch in batches:
            full = logits(batch)[batch["mask"]].double().log_softmax(-1)
            count += len(full)
            for name, layer in layers.items():
                for index, grid in enumerate(grids):
                    layer.spec, layer.inputs, layer.enabled = grid, None, True
                    ours = logits(batch)[batch["mask"]].double().log_softmax(-1)
                    sums[name][index] += float((full.exp() * (full - ours)).sum())
                layer.enabled = False
    finally:
        for name, layer in layers.items():
            layer.spec, layer.inputs = kept[name]
        switch(model, enabled=True)
        model.train(training)
    if not count:
        raise InputError("no token of the calibration data counts, so no layer's sensitivity can be told")
    return [
        Sensitivity(
            layer=name,
            weights=layer.weight.numel(),
            kl=tuple(max(value / count, 0.0) for value in sums[name]),
            bits=tuple(stored_bits(grid, layer.in_features) for grid in grids),
        )
        for name, layer in layers.items()
    ]


def stored_bits(spec: QuantizerSpec, in_features: int) -> float:
    """Bits a weight as stored: its code's, and its share of the scale's 16 and the zero point's 8."""
    words = spec.compressed_tensors_arguments()
    code, beside = (words["num_bits"], 16) if words["symmetric"] else (8, 24)  # see the exporter: a byte a code
    return float(code + beside * spec.groups(in_features) / in_features)


def choose(found: Sequence[Sensitivity], bits: float) -> dict[str, int]:
    """The grid of every layer, by its index, with the least summed loss within a mean of so many bits a weight.

    Raises:
        InputError: even the cheapest grids need more.
    """
    total = sum(one.weights for one in found)
    chosen = {one.layer: min(zip(one.bits, one.kl, range(len(one.bits)), strict=True))[2] for one in found}
    left = bits * total - sum(one.bits[chosen[one.layer]] * one.weights for one in found)
    if left < 0:
        least = bits - left / total
        raise InputError(f"bits ({bits}) is less than the {least:.3f} of the cheapest grids; raise it or add a grid")
    while True:
        steps = [
            ((one.kl[now] - one.kl[i]) / cost, cost, one.layer, i)
            for one in found
            for now in [chosen[one.layer]]
            for i in range(len(one.bits))
            if one.kl[i] < one.kl[now] and 0 < (cost := (one.bits[i] - one.bits[now]) * one.weights) <= left
        ]
        if not steps:
            return chosen
        _, cost, layer, index = max(steps)
        chosen[layer], left = index, left - cost
