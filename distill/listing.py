"""What there is to choose from: the members of every family with their fields, and the JSON schema of a recipe."""

from __future__ import annotations

import json
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from distill.core.errors import InputError
from distill.core.source import suggest
from distill.core.spec import Family, Spec
from distill.core.tasks import MaskSpec
from distill.data.augment_spec import AugmentSpec, ReplaceWords
from distill.data.chat_spec import ChatSpec
from distill.data.clean_spec import CleanSpec
from distill.data.order_spec import OrderSpec
from distill.data.spec import DataSpec, TrainTokenizer
from distill.losses.schedule import Schedule
from distill.models.lora import LoraSpec
from distill.models.new import NewModel
from distill.pruning.budget import SizeBudget
from distill.pruning.keep import KeepSpec
from distill.pruning.reconstruct import ReconstructSpec
from distill.recipe import FAMILIES, Recipe
from distill.recipes import shipped
from distill.stages import STAGES
from distill.stages.ask_every import AskEvery
from distill.stages.evaluate.spec import SpeedSpec
from distill.stages.prune.search.spec import SearchSpec, ShortTraining
from distill.stages.quantize.spec import LayerGrid, MixedSpec
from distill.stages.synthesize.exam_spec import ExamSpec
from distill.stages.synthesize.filters_spec import FiltersSpec
from distill.stages.synthesize.writer_spec import ServerSpec
from distill.stages.text import StageMixture
from distill.tracking.spec import LoggingSpec, Price
from distill.training.spec import AlarmSpec, ComputeSpec, OnPolicySpec, OptimizerSpec

SECTIONS: dict[str, type[Spec]] = {
    "mask": MaskSpec,
    "data": DataSpec,
    "chat": ChatSpec,
    "clean": CleanSpec,
    "augment": AugmentSpec,
    "replace_words": ReplaceWords,
    "order": OrderSpec,
    "tokenizer": TrainTokenizer,
    "compute": ComputeSpec,
    "logging": LoggingSpec,
    "price": Price,
    "alarms": AlarmSpec,
    "stage_mixture": StageMixture,
    "writer": ServerSpec,
    "filters": FiltersSpec,
    "exam": ExamSpec,
    "keep": KeepSpec,
    "search": SearchSpec,
    "search.budget": SizeBudget,
    "search.train": ShortTraining,
    "reconstruct": ReconstructSpec,
    "optimizer": OptimizerSpec,
    "schedule": Schedule,
    "on_policy": OnPolicySpec,
    "lora": LoraSpec,
    "layers": LayerGrid,
    "mixed": MixedSpec,
    "model": NewModel,
    "speed": SpeedSpec,
    "evaluate_every": AskEvery,
}
"""Keys of a recipe and of its stages that hold keys of their own, by the name that they have there; a loss's settings
that may be a schedule by that word."""


def listing(wanted: str | None = None) -> str:
    """Every member of a family, one line and its fields each, or the fields of a section; all when none is named.

    Raises:
        InputError: there is no such family or section.
    """
    names = ["recipes", *FAMILIES, *SECTIONS]
    if wanted is not None and wanted not in names:
        raise InputError(f"list {wanted}: no such name (expected one of {', '.join(names)}){suggest(wanted, names)}")
    blocks = []
    if wanted in (None, "recipes"):
        rows = [
            line for name, file in shipped().items() for line in _wrapped(f"  {name:<28} ", _command(file.read_text()))
        ]
        blocks.append("\n".join(["recipes", *rows]))
    for plural, family in FAMILIES.items():
        if wanted in (None, plural):
            blocks.append("\n".join([plural, *_family(family)]))
    for key, section in SECTIONS.items():
        if wanted in (None, key):
            blocks.append("\n".join([*_wrapped(f"{key}: ", _first_line(section)), *_fields(section)]))
    return "\n\n".join(blocks)


def _command(text: str) -> str:
    """The second comment line of a recipe says what it is for."""
    comments = [line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")]
    return comments[1] if len(comments) > 1 else ""


def _family(family: Family) -> list[str]:
    """Each member with its fields; fields that all members have alike stand once, at the end."""
    specs = [spec for _, spec in family.items()]
    alike = {name for name in specs[0].model_fields if len({_line_of(spec, name) for spec in specs}) == 1}
    alike = alike if len(specs) > 1 else set()
    lines = []
    for kind, spec in family.items():
        lines += [*_wrapped(f"  {kind:<20} ", _first_line(spec)), *_fields(spec, without=alike)]
    if common := [line for name in specs[0].model_fields if name in alike for line in _field(specs[0], name)]:
        lines += [f"  each of these {family.noun} entries also takes", *common]
    return lines


def _line_of(spec: type[Spec], name: str) -> str | None:
    return "\n".join(_field(spec, name)) if name in spec.model_fields and name != "kind" else repr(spec)


def _first_line(spec: type[Spec]) -> str:
    return (spec.__doc__ or "").strip().splitlines()[0]


def _fields(spec: type[Spec], without: Iterable[str] = ()) -> list[str]:
    return [line for name in spec.model_fields if name not in {*without, "kind"} for line in _field(spec, name)]


def _field(spec: type[Spec], name: str) -> list[str]:
    """Name, default, choices and meaning of a field, wrapped to the terminal."""
    field = spec.model_fields[name]
    default, meaning = default_of(field), " ".join((field.description or "").split())
    if choices := choices_of(field):
        meaning = f"{meaning} Choices: {', '.join(choices)}.".strip()
    return _wrapped(f"      {name:<24} {default:<14} ", meaning)


def default_of(field: Any) -> str:
    """A field's default in a few characters."""
    return "required" if field.is_required() else _shown(field)


def choices_of(field: Any) -> list[str]:
    """The words that a field takes, where it takes only some."""
    return _choices(field.annotation)


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [choice for option in typing.get_args(annotation) for choice in _choices(option)]
    return []


def _wrapped(head: str, text: str) -> list[str]:
    """``text`` behind ``head``, in lines that fit the terminal and begin below each other."""
    width = max(shutil.get_terminal_size((120, 24)).columns, len(head) + 30)
    lines = textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
    return lines or [head.rstrip()]


def _shown(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    if isinstance(value, Spec):
        return str(getattr(value, "kind", "{...}"))
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(str(getattr(item, "kind", item))) for item in value) + "]"
    return "unset" if value is None else _text(str(value).replace("True", "true").replace("False", "false"))


def _text(value: str) -> str:
    """A text as it is, or in quotes if it would not be seen as it is: empty, with spaces at an end or line breaks."""
    return value if value and value == value.strip() and value.isprintable() else json.dumps(value)


def schema_text() -> str:
    """The JSON schema of a recipe, as it stands in ``recipes/recipe.schema.json``."""
    schema = Recipe.model_json_schema()
    _let_kind_be_name(schema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def _let_kind_be_name(schema: dict[str, Any]) -> None:
    """Allow what pydantic's schema does not know: a member without settings as a bare word, a kind by name."""
    for family in FAMILIES.values():
        references = [{"$ref": f"#/$defs/{spec.__name__}"} for _, spec in family.items()]
        for definition in _walk(schema):
            if definition.get("oneOf") == references:
                choice = {"required": ["kind"], "anyOf": definition.pop("oneOf")}
                bare = {"enum": [kind for kind, spec in family.items() if _may_be_empty(spec)]}
                definition |= choice if family is STAGES else {"anyOf": [choice, bare]}
    stages = schema["properties"]["stages"]
    any_kind = stages["additionalProperties"]
    stages["properties"] = {
        kind: {
            "anyOf": [
                {"$ref": f"#/$defs/{spec.__name__}"},
                any_kind,
                *([{"type": "null"}] if _may_be_empty(spec) else []),
            ]
        }
        for kind, spec in STAGES.items()
    }


def _may_be_empty(spec: type[Spec]) -> bool:
    try:
        spec()
    except ValidationError:  # a field that is required, or one of several
        return False
    return True


def _walk(node: Any) -> typing.Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in list(node.values()):
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)
