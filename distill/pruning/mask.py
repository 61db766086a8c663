"""Sparsity masks: single weights are set to zero, and all shapes stay.

    unstructured    in each row of a layer, a fraction of the weights: those of least importance
    2:4             of every four neighbouring weights in a row, the two of least importance

with importance |W_ij| (magnitude) or |W_ij| * sqrt(sum_tokens a_j^2) (wanda), a_j the layer's input.

A mask alone makes a model neither smaller nor faster: zeros are stored and multiplied like other numbers. 2:4 sparsity
is faster on GPUs with sparse tensor cores, in engines that use them.

Source: Sun et al. 2023, arXiv 2306.11695 (Wanda, which compares within a row); unlike there, the inputs of all layers
come from one pass of the unmasked model. Mishra et al. 2021, arXiv 2104.08378 (2:4, trained with a fixed mask).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.layout import Layout, check, config_of
from distill.pruning.observe import observe
from distill.pruning.output_projections import square_observers

if TYPE_CHECKING:
    from distill.pruning.observe import Batches


def unstructured(importance: Tensor, share: float) -> Tensor:
    """Mask of the weights that stay.

    Args:
        importance: [out, in].
        share: fraction of each row that is removed; the number of weights is rounded down.

    Returns:
        bool [out, in].
    """
    removed = importance.argsort(dim=1, stable=True)[:, : int(share * importance.shape[1])]  # [out, share * in]
    return torch.ones_like(importance, dtype=torch.bool).scatter_(1, removed, False)


def two_of_four(importance: Tensor) -> Tensor:
    """Mask of the weights that stay, bool [out, in]: two of every four neighbours in a row.

    Raises:
        InputError: the row length is not a multiple of 4.
    """
    if importance.shape[1] % 4:
        raise InputError(
            f"2:4 needs in_features that are a multiple of 4 (got {importance.shape[1]}); use pattern: unstructured"
        )
    groups = importance.unflatten(1, (-1, 4)).flatten(0, 1)  # [out * in / 4, 4]
    return unstructured(groups, 0.5).view(importance.shape)


def masked_layers(model: nn.Module, layout: Layout) -> dict[str, nn.Linear]:
    """The linear layers that can be masked, by name: those inside the model's layers, not embeddings and head.

    Raises:
        InputError: a matrix in the layers is not in a plain linear layer, or the layout does not fit the model.
    """
    check(model, layout)
    found: dict[str, nn.Linear] = {}
    for name, layer, _ in layout.named_parameters(config_of(model)):
        if layer is None or model.get_parameter(name).ndim < 2:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        if type(module) is not torch.nn.Linear:
            raise InputError(f"{name} is in a {type(module).__name__}; only plain linear layers can be masked")
        found[name.removesuffix(".weight")] = module
    return found


def squares_of_inputs(model: nn.Module, layout: Layout, batches: Batches) -> dict[str, Tensor]:
    """For each of :func:`masked_layers`, the sum over all unmasked tokens of its squared input, fp64 [in]."""
    statistics = Statistics()
    observe(model, layout, batches, list(square_observers(masked_layers(model, layout), statistics)))
    return statistics.sums


def apply_mask(layers: Mapping[str, nn.Linear], pattern: str, share: float, squares: Mapping[str, Tensor]) -> None:
    """Set weights to zero, in place.

    Args:
        layers: from :func:`masked_layers`.
        pattern: ``unstructured`` or ``2:4``.
        share: fraction of the weights that is removed; ignored by 2:4.
        squares: from :func:`squares_of_inputs` for wanda; empty for magnitude.
    """
    with torch.no_grad():
        for name, layer in layers.items():
            importance = layer.weight.float().abs()  # [out, in]
            if squares:
                importance = importance * squares[name].sqrt().to(importance)
            stays = two_of_four(importance) if pattern == "2:4" else unstructured(importance, share)
            layer.weight.masked_fill_(~stays, 0.0)


def freeze_zeros(layers: Mapping[str, nn.Module]) -> None:
    """Set the gradient of all weights that are zero now to zero, so that training leaves them exactly zero.

    With a gradient of zero, Adam's moments and weight decay are zero as well. The mask is not stored, because the zeros
    of the weights in a checkpoint or model folder determine it.
    """
    for layer in layers.values():
        weight: Any = layer.weight
        weight.register_hook(_ZeroMaskedGradient(weight.detach() == 0))


class _ZeroMaskedGradient:
    """A gradient hook that sets the gradient of the masked weights to zero, on the gradient's device."""

    def __init__(self, masked: Tensor):
        self.masked = masked

    def __call__(self, gradient: Tensor) -> Tensor:
        self.masked = self.masked.to(gradient.device)
        return gradient.masked_fill(self.masked, 0.0)


def nonzero_share(model: nn.Module) -> float:
    """Fraction of a model's parameters, tied ones counted once, that are not zero."""
    parameters = list(model.parameters())
    return sum(int(p.count_nonzero()) for p in parameters) / sum(p.numel() for p in parameters)
