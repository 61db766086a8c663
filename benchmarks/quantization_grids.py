"""Grids and methods of the quantization benchmark. This file imports no package, so the peers can use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KEEP = {"hidden_size": 160, "num_attention_heads": 4, "intermediate_size": 192}
"""Sizes of the student; the teacher has 192, 6 and 384. It has 48 % of the parameters, and rows divisible by 32."""
BATCH_SIZE = 4
NUM_TOKENS, SEARCH_TOKENS = 60_000, 30_000
"""Default number of tokens of a final run and of a run of the learning rate search, for distill and the peers."""

FIRST_RATES = (5e-4, 1e-3)
"""First learning rates of a search, for distill and the peers."""


@dataclass(frozen=True)
class Grid:
    """A grid of weights.

    Attributes:
        quantizer: ``quantizer`` of a recipe.
        scales: possible sources of the scale in training; the best is chosen on the validation books.
        searched: grid from which the choice of scale and learning rate is taken.
    """

    quantizer: dict[str, Any]
    scales: tuple[str | None, ...]
    searched: str

    @property
    def is_integer(self) -> bool:
        """Whether its range can be searched and gptq can choose its codes."""
        return self.quantizer["kind"] in ("int8_channel", "int_group")


def _group(bits: int, searched: str) -> Grid:
    return Grid({"kind": "int_group", "bits": bits, "group_size": 32}, ("absmax", "learned"), searched)


GRIDS = {
    "int8": Grid({"kind": "int8_channel"}, ("absmax",), "int4"),
    "int4": _group(4, "int4"),
    "int3": _group(3, "int3"),
    "int2": _group(2, "int2"),
    "ternary": Grid({"kind": "ternary", "group_size": 32}, (None,), "ternary"),
    "binary": Grid({"kind": "binary", "group_size": 32}, (None,), "ternary"),
}
METHODS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"losses": ["cross_entropy"]},
    "distillation": {"losses": ["forward_kl"]},
    "distillation from itself": {"losses": ["forward_kl"], "teacher": "START"},
    "distillation after gptq": {"losses": ["forward_kl"], "rounding": "gptq"},
    "distillation, scales held": {"losses": ["forward_kl"], "freeze_scales": 0.9},
    "distillation, int8 activations": {"losses": ["forward_kl"], "activations": "dynamic_int8"},
}
"""Ways of training; START stands for the unquantized student."""
SEARCHED = {
    "distillation from itself": "distillation",
    "distillation after gptq": "distillation",
    "distillation, scales held": "distillation",
    "distillation, int8 activations": "distillation",
}
"""Method -> method whose learning rates it uses."""
ONLY = {
    "distillation after gptq": ("int4", "int3", "int2"),
    "distillation, scales held": ("int4", "int3", "int2", "ternary"),
    "distillation, int8 activations": ("int4",),
}
"""Methods that are used for some grids only."""


def rounded(grid: Grid) -> dict[str, dict[str, Any]]:
    """Ways of rounding to a grid without training: name -> keys of a ``quantize`` stage."""
    found: dict[str, dict[str, Any]] = {"nearest": {"quantizer": grid.quantizer}}
    if grid.is_integer:
        searched = {**grid.quantizer, "scale": "mse"}
        found["mse"] = {"quantizer": searched}
        found["gptq"] = {"quantizer": grid.quantizer, "rounding": "gptq"}
        found["gptq, mse"] = {"quantizer": searched, "rounding": "gptq"}
    return found


def scales(grid: str, method: str) -> tuple[str | None, ...]:
    """Possible sources of the scale when a grid is trained; empty if the method is not used for this grid."""
    found = GRIDS[grid].scales if grid in ONLY.get(method, GRIDS) else ()
    return tuple(scale for scale in found if scale == "learned") if "rounding" in METHODS[method] else found


def best(grid: str) -> str:
    """The way of rounding with the smallest loss."""
    return "gptq, mse" if GRIDS[grid].is_integer and grid != "int8" else "nearest"


def trained(grid: Grid, scale: str | None, method: str, start: str) -> dict[str, Any]:
    """A ``quantize`` stage that trains on a grid, without its budget."""
    quantizer = grid.quantizer if scale is None else {**grid.quantizer, "scale": scale}
    keys = {key: start if value == "START" else value for key, value in METHODS[method].items()}
    return {"kind": "quantize", "student": start, "quantizer": quantizer, "embeddings": "keep", **keys}


def longer(method: str, start: str) -> dict[str, Any]:
    """The control of a method: training with the same loss on the same number of tokens, in full precision."""
    if method == "cross-entropy":
        return {"kind": "finetune", "model": start}
    return {"kind": "distill", "student": start, **METHODS[method]}


def stage_name(grid: str, way: str) -> str:
    """The name of a grid and a way as the name of a stage."""
    return f"{grid}-{way}".replace(", ", "-").replace(" ", "-")
