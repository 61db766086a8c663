"""A stage's own text: which stages read one, and how it follows from the recipe's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from distill.data.spec import DataSpec, kinds_of, of_conversations
from distill.stages.base import StageSpec

INHERITED = ("sequence_length", "tokenizer", "validation_tokens", "calibration_sequences")
"""Keys that a stage's own section takes from the recipe's where it does not say them."""


def _how(value: Any) -> str | None:
    """Which form of the key was written."""
    if isinstance(value, str):
        return "stage"
    return "own" if isinstance(value, dict | DataSpec) else None


TextChoice = Annotated[
    Annotated[str, Tag("stage")] | Annotated[DataSpec, Tag("own")],
    Discriminator(
        _how,
        custom_error_type="text_choice",
        custom_error_message="needs the name of an earlier stage, whose text it is, or a section such as {train: ...}",
    ),
]


class ReadsText(StageSpec):
    """A stage that trains, calibrates or measures on text."""

    data: TextChoice | None = None
    """Its own text: a section as the recipe's `data`, or the name of an earlier stage whose text it reads; null: the
    recipe's. What a section does not say of sequence_length, tokenizer, validation_tokens, calibration_sequences and
    chat is the recipe's."""


def data_of(stages: Mapping[str, StageSpec], data: DataSpec, name: str) -> DataSpec:
    """The text that a stage reads.

    Args:
        stages: of the recipe.
        data: the recipe's own section.
        name: of the stage.
    """
    seen: set[str] = set()
    while name in stages and name not in seen:
        seen.add(name)
        own = getattr(stages[name], "data", None)
        if not isinstance(own, str):
            return data if own is None else own
        name = own
    return data


def spoken(stages: Mapping[str, StageSpec], data: DataSpec) -> DataSpec:
    """The text by whose chat template models of a run are saved and asked: the first that has conversations."""
    texts = [data, *(data_of(stages, data, name) for name in stages)]
    return next((text for text in texts if text.holds_conversations), data)


def own_texts(stages: Mapping[str, StageSpec], data: DataSpec) -> dict[str, DataSpec]:
    """Key in the recipe -> every section of text that there is, the recipe's first."""
    sections = {name: getattr(stage, "data", None) for name, stage in stages.items()}
    own = {f"stages.{name}.data": section for name, section in sections.items() if isinstance(section, DataSpec)}
    return {"data": data, **own}


def with_inherited(section: Any, data: Any) -> Any:
    """A stage's section as it was written, with what it takes from the recipe's; anything else as it is."""
    if not isinstance(section, dict) or not isinstance(data, dict):
        return section
    keys = [key for key in INHERITED if key in data]
    kinds = [kind for key in ("train", "validation") for kind in kinds_of(section.get(key))]
    if "chat" in data and any(of_conversations(kind) for kind in kinds):
        keys.append("chat")
    return {**{key: data[key] for key in keys}, **section}
