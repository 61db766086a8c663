"""The sizes that a recipe wants to keep, by the names of the config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from distill.core.spec import Spec

if TYPE_CHECKING:
    from typing import Self


AXIS_OF_KEY = {
    "hidden_size": "hidden_channels",
    "intermediate_size": "mlp_neurons",
    "num_attention_heads": "attention_heads",
    "num_key_value_heads": "kv_groups",
    "num_experts": "experts",
    "num_hidden_layers": "layers",
}
"""Key of :class:`KeepSpec` -> the axis that it cuts."""


class KeepSpec(Spec):
    """Sizes of the pruned model, by the names that most configs use; a size that is left out stays."""

    hidden_size: int | None = Field(None, gt=0)
    """Hidden channels to keep; null keeps all."""
    intermediate_size: int | None = Field(None, gt=0)
    """MLP neurons to keep in each layer, in a mixture of experts in each expert; null keeps all."""
    num_attention_heads: int | None = Field(None, gt=0)
    """Query heads to keep in each layer, as many in each KV group; null keeps all those of the groups that stay."""
    head_choice: Literal["drop", "merge"] = "drop"
    """What becomes of query heads of a KV group that are cut: drop leaves them out; merge keeps, in the queries of the
    heads that only just stay, their difference from those that only just go (arXiv 2407.14679)."""
    num_key_value_heads: int | None = Field(None, gt=0)
    """KV groups to keep in each layer; null keeps all."""
    group_choice: Literal["drop", "pool", "silence"] = "drop"
    """What becomes of KV groups: drop takes their query heads along; pool averages neighbours, all query heads stay;
    silence keeps the query heads of dropped groups on those that stay, with an output of zero, to learn anew."""
    num_experts: int | None = Field(None, gt=0)
    """Experts to keep in each layer of a mixture of experts; null keeps all."""
    vocabulary: Annotated[int, Field(gt=0)] | Literal["used"] | None = None
    """Tokens to keep: used keeps those that the training text has, a number the most frequent ones; special tokens and
    single bytes stay in any case, and the tokenizer is cut alike. Null keeps all."""
    num_hidden_layers: int | None = Field(None, gt=0)
    """Layers to keep, the first and the last among them, the others by score; null keeps all."""
    layers: tuple[int, ...] | None = None
    """Indices of the layers to keep, counted from 0, in rising order; null lets num_hidden_layers decide."""
    layer_choice: Literal["lowest", "contiguous"] = "lowest"
    """Which layers num_hidden_layers drops: those of lowest score, or the block of neighbours with the lowest sum."""

    def cuts(self) -> list[str]:
        """The keys that name something to cut."""
        return [key for key in (*AXIS_OF_KEY, "layers", "vocabulary") if getattr(self, key) is not None]

    @model_validator(mode="after")
    def _depth_is_named_once(self) -> Self:
        if self.layers is not None and self.num_hidden_layers is not None:
            raise ValueError("layers and num_hidden_layers both say the depth; keep one of them")
        if self.layer_choice != "lowest" and self.num_hidden_layers is None:
            raise ValueError(f"layer_choice {self.layer_choice!r} has no effect without num_hidden_layers")
        if self.layers is not None and (not self.layers or list(self.layers) != sorted({*self.layers})):
            raise ValueError(f"layers must rise and name each layer once (got {list(self.layers)})")
        if self.group_choice != "drop" and self.num_key_value_heads is None:
            raise ValueError(f"group_choice {self.group_choice!r} has no effect without num_key_value_heads")
        if self.head_choice != "drop" and self.num_attention_heads is None:
            raise ValueError(f"head_choice {self.head_choice!r} has no effect without num_attention_heads")
        if self.group_choice == "silence" and self.num_attention_heads is not None:
            raise ValueError("group_choice 'silence' keeps all query heads; leave num_attention_heads out")
        return self
