"""The contenders of ``real_models``: distill's own, and those of other libraries, for a share of a model's parameters.

A share is that of the parameters outside the embeddings. Widths are the nearest multiples of 64 (of 8 in small models).
Layers are whole, so depth keeps the smallest number of layers with at least the share: a contender that removes layers
has never fewer parameters than was asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHARES = (0.72, 0.55, 0.85)
WIDTH, SOLVED, TAYLOR = "distill width", "distill width reconstructed", "distill width Taylor"
RANGE = "distill width range"
SEARCH, DEPTH = "distill search", "distill depth"
OURS = (WIDTH, RANGE, SOLVED, TAYLOR, SEARCH, DEPTH)
"""MLP neurons by the default criterion, by ``weight_range``, by the default with recomputed output projections
(``prune.reconstruct``), and by gradients; a search by gradients; layers by the default criterion."""
PEERS: dict[str, str] = {
    "optipfair width": "optipfair",
    "optipfair depth": "optipfair",
    "Torch-Pruning width": "torch-pruning",
    "soup shrink": "soup",
    "Model-Optimizer width": "model-optimizer",
}
"""Contender -> environment in which it cuts."""
CONTENDERS = (
    WIDTH,
    RANGE,
    "optipfair width",
    "Torch-Pruning width",
    TAYLOR,
    DEPTH,
    "soup shrink",
    "optipfair depth",
    SEARCH,
    "Model-Optimizer width",
)
"""Those that are measured unless others are named, in this order. Reconstruction takes longer than the training."""


CRITERIA: dict[str, dict[str, Any]] = {
    "weight_range": {},
    "wanda": {},
    "activation, L2 over tokens": {"kind": "activation", "sequence": "l2"},
    "fluctuation": {},
    "activation": {},
    "taylor": {},
    "magnitude": {},
    "random": {},
}
"""Criteria for MLP neurons, with their settings."""


@dataclass(frozen=True)
class Sizes:
    """What a share leaves.

    Attributes:
        intermediate_size: MLP neurons per layer, if nothing else is removed.
        num_hidden_layers: layers, if nothing else is removed.
        non_embedding_parameters: parameters outside the embeddings, for a search.
    """

    intermediate_size: int
    num_hidden_layers: int
    non_embedding_parameters: int


def sizes(config: Mapping[str, Any], outside: int, share: float) -> Sizes:
    """The sizes of a share.

    Args:
        config: of a model with gated MLPs, such as a Llama.
        outside: its parameters outside the embeddings.
        share: of them, 0 to 1.

    Raises:
        ValueError: the MLPs have fewer parameters than must go.
    """
    neurons, layers = config["intermediate_size"], config["num_hidden_layers"]
    unit = 64 if neurons >= 1024 else 8
    per_neuron = 3 * config["hidden_size"] * layers  # gate, up and down
    kept = unit * round((neurons - (1 - share) * outside / per_neuron) / unit)
    if kept <= 0:
        raise ValueError(f"a share of {share} leaves no MLP neurons: they have {neurons * per_neuron / outside:.0%}")
    return Sizes(kept, math.ceil(share * layers - 1e-9), int(share * outside))


def stage(contender: str, wanted: Sizes, search: Mapping[str, Any]) -> dict[str, Any]:
    """The prune stage of one of OURS.

    Args:
        contender: one of OURS.
        wanted: the sizes.
        search: keys of ``prune.search`` besides the budget.
    """
    if contender in (WIDTH, RANGE, SOLVED, TAYLOR):
        more: dict[str, dict[str, Any]] = {RANGE: {"criterion": "weight_range"}}
        more |= {SOLVED: {"reconstruct": {"num_sequences": 16}}, TAYLOR: {"criterion": "taylor"}}
        return {"kind": "prune", "keep": {"intermediate_size": wanted.intermediate_size}, **more.get(contender, {})}
    if contender == DEPTH:
        return {"kind": "prune", "keep": {"num_hidden_layers": wanted.num_hidden_layers}}
    budget = {"non_embedding_parameters": wanted.non_embedding_parameters}
    gradients = {"criterion": "taylor", "depth_criterion": "taylor"}
    return {"kind": "prune", **gradients, "search": {"budget": budget, **search}}
