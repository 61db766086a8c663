"""Sizes and criteria of the pruning benchmark. This file imports no package, so the peers' environment can use it."""

from __future__ import annotations

from typing import Any

SHAPES: dict[int, dict[str, dict[str, int]]] = {
    75: {
        "width": {"hidden_size": 168, "intermediate_size": 304},
        "heads": {"num_attention_heads": 4, "intermediate_size": 288},
        "mlp": {"intermediate_size": 244},
        "depth": {"num_hidden_layers": 6},
    },
    50: {
        "width": {"hidden_size": 144, "intermediate_size": 192},
        "heads": {"hidden_size": 144, "num_attention_heads": 4, "intermediate_size": 240},
        "mlp": {"intermediate_size": 108},
        "depth": {"num_hidden_layers": 4},
    },
    25: {
        "width": {"hidden_size": 96, "intermediate_size": 104},
        "heads": {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 148},
        "depth": {"num_hidden_layers": 2},
    },
}
"""Percentage of the parameters outside the embeddings -> shape -> sizes to keep; the teacher has 192, 384, 6 heads and
8 layers. Pruning the MLP alone cannot remove three quarters. With two layers, every criterion keeps the first and the
last."""
WIDTH_CRITERIA = ("activation", "fluctuation", "wanda", "weight_range", "taylor", "magnitude", "random")
DEPTH_CRITERIA: dict[str, dict[str, Any]] = {
    "block_influence": {},
    "block_influence contiguous": {"kind": "block_influence"},
    "leave_one_out": {},
    "leave_one_out kl": {"kind": "leave_one_out", "loss": "kl"},
    "leave_one_out kl contiguous": {"kind": "leave_one_out", "loss": "kl"},
    "taylor": {},
    "random": {},
}
NUM_CHANCES = 3
"""Number of random prunings, each with its own seed."""
START = "width activation"
"""The pruned model whose learning rate is used for all models of its fraction, and whose architecture the controls
have."""

SOLVED = f"{START}, reconstructed"
"""The same pruned model with recomputed output projections."""
SEARCH, EVEN = "budget search", "even shares"
"""The architecture that the search chose, and the one that keeps nearly the same fraction of each axis."""
SEARCHES: dict[str, dict[str, Any]] = {
    SEARCH: {},
    f"{SEARCH}, taylor": {
        "criterion": {"kind": "taylor"},
        "depth_criterion": {"kind": "leave_one_out", "loss": "kl"},
        "search": {"multiple_of": {"hidden_size": 24, "intermediate_size": 4}},
    },
}
"""Searches by their settings: default criteria; gradients and leave-one-out, with smaller steps for the MLP."""


def solved(share: int) -> dict[str, Any]:
    """The prune stage of SOLVED."""
    return {**cuts(share)[START], "reconstruct": {"num_sequences": 64}}


def search(name: str, most: int, training: dict[str, Any]) -> dict[str, Any]:
    """A prune stage that searches an architecture with at most ``most`` parameters outside the embeddings."""
    others = SEARCHES[name]
    return {
        "kind": "prune",
        **others,
        "search": {
            "budget": {"non_embedding_parameters": most},
            "axes": ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"],
            "multiple_of": {"hidden_size": 24, "intermediate_size": 16},
            "smallest_share": 0.25,
            "train": {"num_candidates": 3, **training},
            **others.get("search", {}),
        },
    }


def cuts(share: int, seeds: range = range(NUM_CHANCES)) -> dict[str, dict[str, Any]]:
    """Prune stages by name: "shape criterion", or "shape random SEED" for each seed of a random criterion."""
    found: dict[str, dict[str, Any]] = {}
    for shape, keep in SHAPES[share].items():
        if shape == "depth":
            for name, criterion in DEPTH_CRITERIA.items():
                if keep["num_hidden_layers"] > 2 or name == next(iter(DEPTH_CRITERIA)):
                    sizes = {**keep, "layer_choice": "contiguous"} if name.endswith("contiguous") else keep
                    found |= _each(
                        f"depth {name}", {"keep": sizes}, "depth_criterion", {"kind": name, **criterion}, seeds
                    )
            continue
        for name in WIDTH_CRITERIA:
            if name == "weight_range" and "intermediate_size" not in keep:
                continue  # it scores only MLP neurons
            # these criteria do not score hidden channels, which are chosen by the default criterion
            key = "mlp_criterion" if name in ("fluctuation", "wanda", "weight_range") else "criterion"
            found |= _each(f"{shape} {name}", {"keep": keep}, key, {"kind": name}, seeds)
    return found


def _each(
    name: str, stage: dict[str, Any], key: str, criterion: dict[str, Any], seeds: range
) -> dict[str, dict[str, Any]]:
    """One stage, or for a random criterion one stage per seed."""
    if criterion["kind"] != "random":
        return {name: {"kind": "prune", **stage, key: criterion}}
    return {f"{name} {seed}": {"kind": "prune", **stage, key: {**criterion, "seed": seed}} for seed in seeds}


def stage_name(cut: str) -> str:
    """The name of a pruned model as the name of a stage."""
    return cut.replace(" ", "-").replace(",", "")


def telling(share: int, seed: int) -> dict[str, list[str]]:
    """The models to train first: name -> pruned models from which each round starts."""
    chance = {f"{shape} random": [f"{shape} random {seed}"] for shape in ("width", "depth") if _is_cut(share, shape)}
    depth = "depth leave_one_out kl contiguous" if _is_cut(share, "depth") else "depth block_influence"
    rounds = {"width activation, two rounds": [START, START]} if share < 75 else {}
    mlp = ["mlp taylor"] if _is_cut(share, "mlp") else []
    ours = {name: [name] for name in (START, SOLVED, depth, *mlp, *SEARCHES, EVEN)}
    return {**ours, **chance, **rounds}


def others(share: int, seed: int) -> dict[str, list[str]]:
    """The models to train afterwards: the other criteria."""
    return {name: [name] for name in cuts(share, range(0)) if name not in telling(share, seed)}


def _is_cut(share: int, shape: str) -> bool:
    """Whether a criterion has a choice for this shape."""
    return shape in SHAPES[share] and (shape != "depth" or SHAPES[share]["depth"]["num_hidden_layers"] > 2)
