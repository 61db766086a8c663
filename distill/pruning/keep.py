"""The sizes that a recipe wants to keep, by the names of the config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from distill.core.spec import Spec

if TYPE_CHECKING:
    from typing import Self


class KeepSpec(Spec):
    """Sizes of the pruned model, by the names of the config; a size that is left out stays."""

    hidden_size: int | None = Field(None, gt=0)
    """Hidden channels to keep; null keeps all."""
    intermediate_size: int | None = Field(None, gt=0)
    """MLP neurons to keep in each layer; null keeps all."""
    num_attention_heads: int | None = Field(None, gt=0)
    """Query heads to keep in each layer, as many in each KV group; null keeps all those of the groups that stay."""
    num_key_value_heads: int | None = Field(None, gt=0)
    """KV groups to keep in each layer; a group takes its query heads along; null keeps all."""
    num_hidden_layers: int | None = Field(None, gt=0)
    """Layers to keep, the first and the last among them, the others by score; null keeps all."""
    layers: tuple[int, ...] | None = None
    """Indices of the layers to keep, counted from 0, in rising order; null lets num_hidden_layers decide."""
    layer_choice: Literal["lowest", "contiguous"] = "lowest"
    """Which layers num_hidden_layers drops: those of lowest score, or the block of neighbours with the lowest sum."""

    @model_validator(mode="after")
    def _depth_is_named_once(self) -> Self:
        if self.layers is not None and self.num_hidden_layers is not None:
            raise ValueError("layers and num_hidden_layers both say the depth; keep one of them")
        if self.layer_choice != "lowest" and self.num_hidden_layers is None:
            raise ValueError(f"layer_choice {self.layer_choice!r} has no effect without num_hidden_layers")
        if self.layers is not None and (not self.layers or list(self.layers) != sorted({*self.layers})):
            raise ValueError(f"layers must rise and name each layer once (got {list(self.layers)})")
        return self
