"""Sensitivity of each layer to each quantizer, and the choice of quantizers with the least loss within a bit budget.

    loss(layer, quantizer) = mean over tokens of KL(full precision || only that layer quantized)

The choice starts with the cheapest quantizer for every layer. It then repeatedly makes the change that reduces the loss
most per additional bit, until no change fits the budget. It assumes that the losses of single layers add up, which
holds while they are small.

Source: Dong et al. 2019, arXiv 1911.03852 (sensitivity decides precision; there by the Hessian); the greedy choice is
that of the knapsack's relaxation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.numerics.kl import kl_summands
from distill.numerics.term import LossTerm
from distill.quantization.base import QuantizerSpec
from distill.quantization.fake_quant import FakeQuantLinear, fake_quant_layers, switch

Logits = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """The loss and size of one layer with each quantizer.

    Attributes:
        layer: dotted name.
        weights: number of weights.
        kl: per quantizer, mean KL divergence from the model in full precision, in nats per token.
        bits: per quantizer, stored bits per weight, including scales.
    """

    layer: str
    weights: int
    kl: tuple[float, ...]
    bits: tuple[float, ...]


@torch.no_grad()
def sensitivity(
    model: nn.Module, grids: Sequence[QuantizerSpec], batches: Iterable[Mapping[str, Tensor]], logits: Logits
) -> list[Sensitivity]:
    """Quantize each linear layer alone with each quantizer: one pass over the batches per layer and quantizer.

    Args:
        model: prepared, with any quantizer; it is not changed.
        grids: the quantizers to try; none may learn its scale.
        batches: ``input_ids`` and ``mask``, [batch, sequence]; tokens where the mask is True are counted.
        logits: batch -> [batch, sequence, vocabulary].

    Raises:
        InputError: the masks select no token, or a quantizer does not fit a layer.
    """
    layers = {n: layer for n, layer in fake_quant_layers(model).items() if isinstance(layer, FakeQuantLinear)}
    kept = {name: (layer.spec, layer.inputs) for name, layer in layers.items()}
    nothing = LossTerm(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64))
    terms, count = {name: [nothing] * len(grids) for name in layers}, 0
    training = model.training
    try:
        model.eval()
        switch(model, enabled=False)
        for batch in batches:
            full = logits(batch)[batch["mask"]].double().log_softmax(-1)  # [tokens, vocabulary]
            count += len(full)
            for name, layer in stoppable(layers.items()):
                for index, grid in enumerate(grids):
                    layer.spec, layer.inputs, layer.enabled = grid, None, True
                    quantized = logits(batch)[batch["mask"]].double().log_softmax(-1)  # [tokens, vocabulary]
                    summed = kl_summands(full, quantized).sum().cpu()
                    terms[name][index] += LossTerm(summed, torch.tensor(len(full)))
                layer.enabled = False
    finally:
        for name, layer in layers.items():
            layer.spec, layer.inputs = kept[name]
        switch(model, enabled=True)
        model.train(training)
    if not count:
        raise InputError("the masks of the calibration data select 0 tokens, expected 1 or more; use more data")
    return [
        Sensitivity(
            layer=name,
            weights=layer.weight.numel(),
            kl=tuple(max(term.per_token().item(), 0.0) for term in terms[name]),
            bits=tuple(stored_bits(grid, layer.in_features) for grid in grids),
        )
        for name, layer in layers.items()
    ]


def stored_bits(spec: QuantizerSpec, in_features: int) -> float:
    """Stored bits per weight: those of its code, of its scale (16, or 32 for Q6_K) and of a zero point (8)."""
    arguments = spec.compressed_tensors_arguments()
    scale = 32 if spec.scale_dtype == "float32" else 16
    # the exporter stores asymmetric codes as one byte each
    code, per_group = (arguments["num_bits"], scale) if arguments["symmetric"] else (8, scale + 8)
    return float(code + per_group * spec.groups(in_features) / in_features)


def choose(found: Sequence[Sensitivity], bits: float) -> dict[str, int]:
    """The index of the quantizer per layer with the least summed loss within ``bits`` per weight on average.

    Raises:
        InputError: the cheapest quantizers already need more bits.
    """
    total = sum(one.weights for one in found)
    chosen = {one.layer: min(zip(one.bits, one.kl, range(len(one.bits)), strict=True))[2] for one in found}
    left = bits * total - sum(one.bits[chosen[one.layer]] * one.weights for one in found)
    if left < 0:
        least = bits - left / total
        raise InputError(
            f"bits ({bits}) must be at least {least:.3f}, the average with the cheapest quantizers; raise it, or add a "
            "quantizer with fewer bits"
        )
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
