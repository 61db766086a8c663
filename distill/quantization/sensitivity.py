"""Sensitivity of each layer to each quantizer, and the choice of quantizers with the least loss within a bit budget.

    loss(layer, quantizer) = mean over tokens of KL(full precision || only that layer quantized)

The choice starts with the cheapest quantizer for every layer. It then repeatedly makes the change that reduces the loss
most per additional bit, until no change fits the budget. It assumes that the losses of single layers add up, which
holds while they are small.

Source: Dong et al. 2019, arXiv 1911.03852 (sensitivity decides precision; there by the Hessian); the greedy choice is
that of the knapsack's relaxation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.numerics.kl import kl
from distill.numerics.term import LossTerm
from distill.quantization.base import QuantizerSpec
from distill.quantization.fake_quant import FakeQuantLinear, fake_quant_layers, switch

Predictions = Callable[[dict[str, Tensor]], Callable[[slice], Tensor]]
"""A batch -> a part of its counted tokens -> their logits [tokens, vocabulary], as of
:func:`distill.evaluation.quality.predictions_of`."""
CHUNK_TOKENS = 1024


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
    model: nn.Module, grids: Sequence[QuantizerSpec], batches: Iterable[dict[str, Tensor]], predictions: Predictions
) -> list[Sensitivity]:
    """Quantize only one linear layer at a time, with each quantizer: one pass over the batches per layer and quantizer.

    Logits are computed for :data:`CHUNK_TOKENS` tokens at a time.

    Args:
        model: prepared, with any quantizer; it is not changed.
        grids: the quantizers to try; none may learn its scale.
        batches: ``input_ids`` and ``mask``, [batch, sequence]; tokens where the mask is True are counted.
        predictions: of the model.

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
            full = predictions(batch)
            num_tokens = int(batch["mask"].sum())
            count += num_tokens
            for name, layer in stoppable(layers.items()):
                for index, grid in enumerate(grids):
                    layer.spec, layer.inputs, layer.enabled = grid, None, True
                    quantized = predictions(batch)
                    for start in range(0, num_tokens, CHUNK_TOKENS):
                        piece = slice(start, min(start + CHUNK_TOKENS, num_tokens))
                        layer.enabled = False  # the layer may be the head, which is called here
                        log_p = full(piece).double().log_softmax(-1)  # [chunk, vocabulary]
                        layer.enabled = True
                        log_q = quantized(piece).double().log_softmax(-1)  # [chunk, vocabulary]
                        terms[name][index] += LossTerm(kl(log_p, log_q).sum().cpu(), torch.tensor(len(log_p)))
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
