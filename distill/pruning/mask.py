"""Masks: single weights at zero, where structured pruning takes whole units away. The shapes of the model stay.

    unstructured    in each row of a layer the weights of least importance, a share of them
    2:4             of every four neighbours in a row the two of least importance

with importance |W_ij| (magnitude) or |W_ij| * sqrt(sum_tokens a_j^2) (wanda), a_j the layer's input.

A mask by itself makes nothing smaller or faster: zeros are stored and multiplied like other numbers. 2:4 is what the
sparse matrix units of some GPUs can skip, in engines that ask for it.

Source: Sun et al. 2023, arXiv 2306.11695 (Wanda, which compares within a row); here all layers are judged by what
enters them in the unmasked model, in one pass. Mishra et al. 2021, arXiv 2104.08378 (2:4, trained with a fixed mask).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.pruning.layout import Layout, check, config_of
from distill.pruning.tally import Tally
from distill.pruning.watch import Passage, watch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.watch import Batches, Watcher


def unstructured(importance: Tensor, share: float) -> Tensor:
    """Which weights stay, bool [out, in]: in each row all but ``share`` of them, rounded down."""
    import torch

    gone = importance.argsort(dim=1, stable=True)[:, : int(share * importance.shape[1])]
    return torch.ones_like(importance, dtype=torch.bool).scatter_(1, gone, False)


def two_of_four(importance: Tensor) -> Tensor:
    """Which weights stay, bool [out, in]: two of every four neighbours in a row.

    Raises:
        InputError: four does not divide the row.
    """
    if importance.shape[1] % 4:
        raise InputError(f"2:4 needs rows of a multiple of 4 weights (got {importance.shape[1]}); use unstructured")
    return unstructured(importance.unflatten(1, (-1, 4)).flatten(0, 1), 0.5).view(importance.shape)


def masked_layers(model: nn.Module, layout: Layout) -> dict[str, nn.Linear]:
    """Name -> linear layer, of all matrices inside the model's layers: embeddings and head are never masked.

    Raises:
        InputError: a matrix in the layers is no plain linear layer, or the layout does not fit the model.
    """
    import torch

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
    """Name of each layer that can be masked -> sum over the tokens that count of its squared input, fp64 [in]."""
    tally = Tally()

    def watcher(name: str) -> Watcher:
        def add(passage: Passage) -> None:
            tally.add(name, passage.given.float().square().sum((0, 1)))

        return add

    watch(model, layout, batches, [(name, watcher(name)) for name in masked_layers(model, layout)])
    return tally.sums


def apply_mask(layers: Mapping[str, nn.Linear], pattern: str, share: float, squares: Mapping[str, Tensor]) -> None:
    """Set weights to zero, in place.

    Args:
        layers: as :func:`masked_layers` gives them.
        pattern: ``unstructured`` or ``2:4``.
        share: of the weights that go; 2:4 does not read it.
        squares: as :func:`squares_of_inputs` gives them; empty: by magnitude.
    """
    import torch

    with torch.no_grad():
        for name, layer in layers.items():
            importance = layer.weight.float().abs()
            if squares:
                importance = importance * squares[name].sqrt().to(importance)
            stays = two_of_four(importance) if pattern == "2:4" else unstructured(importance, share)
            layer.weight.masked_fill_(~stays, 0.0)


def hold_zeros(layers: Mapping[str, nn.Module]) -> None:
    """From now on the weights of these layers that are zero get no gradient, and so stay zero, to the last bit.

    Adam's moments of a gradient that is always zero are zero, and decay takes nothing from zero. The mask is not
    stored: whoever loads the weights, from a checkpoint or a model folder, finds it in them.
    """
    for layer in layers.values():
        weight: Any = layer.weight
        weight.register_hook(_Held(weight.detach() == 0))


class _Held:
    """A hook that takes the gradient from some weights, on whatever device it comes."""

    def __init__(self, gone: Tensor):
        self.gone = gone

    def __call__(self, gradient: Tensor) -> Tensor:
        self.gone = self.gone.to(gradient.device)
        return gradient.masked_fill(self.gone, 0.0)


def nonzero_share(model: nn.Module) -> float:
    """Share of a model's parameters, tied ones once, that are not zero."""
    parameters = list(model.parameters())
    return sum(int(p.count_nonzero()) for p in parameters) / sum(p.numel() for p in parameters)
