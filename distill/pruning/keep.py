"""The sizes of the pruned model, under the names of the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

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


def _is_number_or_text(value: Any) -> Any:
    whole = isinstance(value, int | str) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise ValueError(f"expected a whole number, or a percentage of the model's such as 50% (got {value!r})")
    return value


def _size(value: int | str) -> int | str:
    if isinstance(value, str):
        try:
            share = float(value.removesuffix("%")) if value.endswith("%") else 0.0
        except ValueError:
            share = 0.0
        if not 0 < share < 100:
            raise ValueError(f"expected a whole number, or a percentage of the model's such as 50% (got {value!r})")
    elif value <= 0:
        raise ValueError(f"must be greater than 0, or a percentage such as 50% (got {value})")
    return value


def _share(percentage: str) -> float:
    return float(percentage.removesuffix("%")) / 100


Size = Annotated[
    int | str,
    BeforeValidator(_is_number_or_text),
    AfterValidator(_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^\d+(\.\d+)?%$"},
            ]
        }
    ),
]
"""A number of units, or a percentage of those that the model has."""


class KeepSpec(Spec):
    """Sizes of the pruned model, under the names that most configs use; an omitted size is not changed.

    A size is a number, or a percentage of the model's, such as 50%.
    """

    hidden_size: Size | None = None
    """Hidden channels to keep; null keeps all."""
    intermediate_size: Size | None = None
    """MLP neurons to keep per layer, or per expert in a mixture of experts; null keeps all."""
    num_attention_heads: Size | None = None
    """Query heads to keep per layer, the same number in each KV group; null keeps all heads of the groups that stay."""
    head_choice: Literal["drop", "merge"] = "drop"
    """How query heads within a KV group are removed. drop: removed; merge: the lowest-scored kept heads become
    2 * kept - removed, each paired with one of the highest-scored removed heads (arXiv 2407.14679)."""
    num_key_value_heads: Size | None = None
    """KV groups to keep per layer; null keeps all."""
    group_choice: Literal["drop", "pool", "silence"] = "drop"
    """How KV groups are removed. drop: with their query heads; pool: neighbouring groups are averaged and all query
    heads stay; silence: query heads of removed groups move to kept groups, with their output set to zero, and are
    trained again."""
    num_experts: Size | None = None
    """Experts to keep per layer of a mixture of experts; null keeps all."""
    vocabulary: Annotated[int, Field(gt=0)] | Literal["used"] | None = None
    """Tokens to keep. used: those that occur in the training text; a number: the most frequent ones. Special tokens and
    single bytes always stay, and the tokenizer is cut in the same way. Null keeps all."""
    num_hidden_layers: Size | None = None
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

    def num_layers_of(self, total: int) -> int:
        """How many of so many layers stay."""
        if self.layers is not None:
            return len(self.layers)
        wanted = self.num_hidden_layers
        return max(2, round(total * _share(wanted))) if isinstance(wanted, str) else wanted or total

    def resolved(self, before: Mapping[str, int]) -> Self:
        """The same with numbers in place of percentages.

        A width is rounded down to a multiple of 32 if the model's is one (else of 16, 8, 4 or 2), query heads to a
        multiple of the kept KV groups, and everything else to the nearest whole number.

        Args:
            before: axis -> size of the model that is pruned.
        """
        asked = {key: value for key in AXIS_OF_KEY if isinstance(value := getattr(self, key), str)}
        known = {key: value for key, value in asked.items() if AXIS_OF_KEY[key] in before}
        if not known:
            return self
        sizes: dict[str, int] = {}
        for key, value in known.items():
            size = before[AXIS_OF_KEY[key]]
            wanted = size * _share(value)
            if key == "num_hidden_layers":
                sizes[key] = self.num_layers_of(size)
            elif key in ("hidden_size", "intermediate_size"):
                step = next(step for step in (32, 16, 8, 4, 2, 1) if size % step == 0 and step <= max(1, wanted))
                sizes[key] = max(step, int(wanted // step) * step)
            else:
                sizes[key] = max(1, round(wanted))
        if "num_attention_heads" in known:
            kept = sizes.get("num_key_value_heads", self.num_key_value_heads)
            groups = kept if isinstance(kept, int) else before["kv_groups"]
            if before["kv_groups"] < before["attention_heads"]:
                sizes["num_attention_heads"] = max(1, round(sizes["num_attention_heads"] / groups)) * groups
        return self.model_copy(update=sizes)

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
