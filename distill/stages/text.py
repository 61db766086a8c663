"""The key ``data`` of a stage: its forms, and what it inherits from the recipe's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from distill.core.spec import Spec
from distill.data.base import SourceSpec
from distill.data.made import Made
from distill.data.mixture import Mixture
from distill.data.spec import DataSpec, Packing, holds_conversations
from distill.stages.base import StageSpec

INHERITED = ("sequence_length", "tokenizer", "validation_tokens", "calibration_sequences", "held_out")
"""Keys that a stage's own section inherits from the recipe's `data` if it omits them."""


class StageMixture(Spec):
    """Rows that stages make, mixed with the recipe's training text. The recipe expands it to a section of data."""

    mixture: dict[str, float] = Field(min_length=1)
    """Name of a stage that makes rows, or `train` for the recipe's training text -> fraction of the training tokens."""
    max_repeats: float | None = Field(None, gt=0)
    """Largest number of passes over a source; unset: 4."""
    sequence_length: int | None = Field(None, ge=2)
    """Largest number of tokens per row; unset: the recipe's."""
    packing: Packing | None = None
    """How documents share a row; unset: best_fit."""

    @model_validator(mode="after")
    def _is_written_out(self) -> StageMixture:
        raise ValueError("a mixture of stages can only be written in a recipe, which knows its stages")


def _how(value: Any) -> str | None:
    """Which form of the key was written."""
    if isinstance(value, str):
        return "stage"
    if isinstance(value, dict) and "mixture" in value:
        return "mixture"
    return "own" if isinstance(value, dict | DataSpec) else None


TextChoice = Annotated[
    Annotated[str, Tag("stage")] | Annotated[DataSpec, Tag("own")] | Annotated[StageMixture, Tag("mixture")],
    Discriminator(
        _how,
        custom_error_type="text_choice",
        custom_error_message="needs the name of an earlier stage, whose text it is, or a section such as {train: ...}",
    ),
]


class ReadsText(StageSpec):
    """A stage that trains, calibrates or measures on text."""

    data: TextChoice | None = None
    """Text of this stage: a section like the recipe's `data`; the name of an earlier stage, for its text or the rows
    that it makes; or {mixture: {STAGE: 0.9, train: 0.1}}, fractions of the tokens from stages that make rows and from
    the recipe's training text. Null: the recipe's text. Keys that a section omits (sequence_length, tokenizer,
    validation_tokens, calibration_sequences, held_out and chat) are inherited from the recipe's `data`."""


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
        if own in stages and stages[own].makes_data:
            return text_made_by(stages[own], own, data)
        name = own
    return data


def text_made_by(stage: StageSpec, name: str, data: DataSpec) -> DataSpec:
    """The text whose rows a stage makes.

    Args:
        stage: which makes them.
        name: its name.
        data: the recipe's own section, which says how rows are read.
    """
    source = Made(stage=name, holds=stage.made_form)
    kept = {key: getattr(data, key) for key in INHERITED}
    if source.holds_conversations():
        kept |= {"chat": data.chat, "packing": data.packing if data.keeps_whole else "best_fit"}
    else:
        kept["packing"] = data.packing
    return DataSpec(train=source, **kept)


def made_sources(data: DataSpec) -> list[Made]:
    """The sources of a text that stages of the run make."""
    return [source for _, source in data.sources() if isinstance(source, Made)]


def located(data: DataSpec, folder_of: Callable[[str], Path]) -> DataSpec:
    """The same text, with the folders of rows that stages make.

    Args:
        data: a text.
        folder_of: name of a stage -> folder of its rows.
    """
    if not made_sources(data):
        return data

    def placed(source: SourceSpec | None) -> SourceSpec | None:
        if isinstance(source, Made):
            return source.model_copy(update={"path": str(folder_of(source.stage))})
        if not isinstance(source, Mixture):
            return source
        sides = {side: getattr(source, side) for side in ("sources", "validation")}
        return source.model_copy(
            update={side: {name: placed(one) for name, one in of.items()} for side, of in sides.items()}
        )

    return data.model_copy(update={"train": placed(data.train), "validation": placed(data.validation)})


def spoken(stages: Mapping[str, StageSpec], data: DataSpec) -> DataSpec:
    """The text whose chat template the models of a run are saved and asked with.

    It is the first one that holds conversations; without one, the recipe's.
    """
    texts = [data, *(data_of(stages, data, name) for name in stages)]
    return next((text for text in texts if text.holds_conversations), data)


def own_texts(stages: Mapping[str, StageSpec], data: DataSpec) -> dict[str, DataSpec]:
    """Key in the recipe -> every section of text that there is, the recipe's first."""
    sections = {name: getattr(stage, "data", None) for name, stage in stages.items()}
    own = {f"stages.{name}.data": section for name, section in sections.items() if isinstance(section, DataSpec)}
    return {"data": data, **own}


def with_inherited(section: Any, data: Any) -> Any:
    """Add the inherited keys to a stage's section, before validation; return anything but a section unchanged."""
    if not isinstance(section, dict) or not isinstance(data, dict):
        return section
    if isinstance(section.get("mixture"), dict) and "train" not in section:
        section = _mixed(section, data)
    keys = [key for key in INHERITED if key in data and not (key == "held_out" and section.get("validation"))]
    if "chat" in data and any(holds_conversations(section.get(key)) for key in ("train", "validation")):
        keys.append("chat")
    return {**{key: data[key] for key in keys}, **section}


def _mixed(section: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The section that `{mixture: {STAGE: share, train: share}}` stands for."""
    shares = section["mixture"]
    sources = {name: data.get("train") if name == "train" else {"kind": "made", "stage": name} for name in shares}
    train: dict[str, Any] = {"kind": "mixture", "sources": sources, "weights": shares}
    if "max_repeats" in section:
        train["max_repeats"] = section["max_repeats"]
    if "train" in shares and data.get("validation") is not None:
        train["validation"] = {"train": data["validation"]}
    return {"train": train, **{key: value for key, value in section.items() if key not in ("mixture", "max_repeats")}}


def with_made_forms(section: Any, forms: Mapping[str, str]) -> Any:
    """A section as it was written, in which each source of kind made says what its stage makes.

    Args:
        section: of a stage.
        forms: name of a stage -> what its rows are.
    """
    if isinstance(section, list):
        return [with_made_forms(one, forms) for one in section]
    if not isinstance(section, dict):
        return section
    filled = {key: with_made_forms(value, forms) for key, value in section.items()}
    if filled.get("kind") == "made" and isinstance(filled.get("stage"), str) and filled["stage"] in forms:
        filled["holds"] = forms[filled["stage"]]
    return filled
