"""The sizes of the pruned model, under the names of the config."""

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
    """Sizes of the pruned model, under the names that most configs use; an omitted size is not changed."""

    hidden_size: int | None = Field(None, gt=0)
    """Hidden channels to keep; null keeps all."""
    intermediate_size: int | None = Field(None, gt=0)
    """MLP neurons to keep per layer, or per expert in a mixture of experts; null keeps all."""
    num_attention_heads: int | None = Field(None, gt=0)
    """Query heads to keep per layer, the same number in each KV group; null keeps all heads of the groups that stay."""
    head_choice: Literal["drop", "merge"] = "drop"
    """How query heads within a KV group are removed. drop: removed; merge: the lowest-scored kept heads become
    2 * kept - removed, each paired with one of the highest-scored removed heads (arXiv 2407.14679)."""
    num_key_value_heads: int | None = Field(None, gt=0)
    """KV groups to keep per layer; null keeps all."""
    group_choice: Literal["drop", "pool", "silence"] = "drop"
    """How KV groups are removed. drop: with their query heads; pool: neighbouring groups are averaged and all query
    heads stay; silence: query heads of removed groups move to kept groups, with their output set to zero, and are
    trained again."""
    num_experts: int | None = Field(None, gt=0)
    """Experts to keep per layer of a mixture of experts; null keeps all."""
    vocabulary: Annotated[int, Field(gt=0)] | Literal["used"] | None = None
    """Tokens to keep. used: those that occur in the training text; a number: the most frequent ones. Special tokens and
    single bytes always stay, and the tokenizer is cut in the same way. Null keeps all."""
    num_hidden_layers: int | None = Field(None, gt=0)
    """Number of layers to keep: always the first and the last, the others by score; null keeps all."""
    layers: tuple[int, ...] | None = None
    """Indices of the layers to keep, counted from 0, in ascending order; null: num_hidden_layers decides."""
    layer_choice: Literal["lowest", "contiguous"] = "lowest"
    """Which layers num_hidden_layers removes: those of lowest score, or the contiguous block with the lowest sum."""

    def cuts(self) -> list[str]:
        """The keys that name something to cut."""
        return [key for key in (*AXIS_OF_KEY, "layers", "vocabulary") if getattr(self, key) is not None]

    def in_words(self) -> str:
        """The sizes as one line of text."""
        sizes = self.model_dump(exclude_none=True, exclude_defaults=True)
        return ", ".join(f"{key} {value}" for key, value in sizes.items()) or "everything"

    @model_validator(mode="after")
    def _depth_is_named_once(self) -> Self:
        if self.layers is not None and self.num_hidden_layers is not None:
            raise ValueError("layers and num_hidden_layers both set the depth; remove one of them")
        if self.layer_choice != "lowest" and self.num_hidden_layers is None:
            raise ValueError(f"layer_choice {self.layer_choice!r} has no effect without num_hidden_layers")
        if self.layers is not None and (not self.layers or list(self.layers) != sorted({*self.layers})):
            raise ValueError(f"layers must be ascending indices without repetition (got {list(self.layers)})")
        if self.group_choice != "drop" and self.num_key_value_heads is None:
            raise ValueError(f"group_choice {self.group_choice!r} has no effect without num_key_value_heads")
        if self.head_choice != "drop" and self.num_attention_heads is None:
            raise ValueError(f"head_choice {self.head_choice!r} has no effect without num_attention_heads")
        if self.group_choice == "silence" and self.num_attention_heads is not None:
            raise ValueError("group_choice 'silence' keeps all query heads; leave num_attention_heads out")
        return self
