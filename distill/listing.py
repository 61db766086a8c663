"""What there is to choose from: the members of every family with their fields, and the JSON schema of a recipe."""

from __future__ import annotations

import json
import typing
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from distill.core.errors import InputError
from distill.core.source import suggest
from distill.core.spec import Spec
from distill.data.spec import DataSpec, TrainTokenizer
from distill.losses.schedule import Schedule
from distill.models.lora import LoraSpec
from distill.pruning.budget import SizeBudget
from distill.pruning.keep import KeepSpec
from distill.pruning.reconstruct import ReconstructSpec
from distill.recipe import FAMILIES, Recipe
from distill.recipes import shipped
from distill.stages import STAGES
from distill.stages.evaluate import SpeedSpec
from distill.stages.finetune import NewModel
from distill.stages.mixed import MixedSpec
from distill.stages.quantize import LayerGrid
from distill.stages.search.spec import SearchSpec, ShortTraining
from distill.tracking.spec import LoggingSpec
from distill.training.spec import AlarmSpec, ComputeSpec, OnPolicySpec, OptimizerSpec

SECTIONS: dict[str, type[Spec]] = {
    "data": DataSpec,
    "tokenizer": TrainTokenizer,
    "compute": ComputeSpec,
    "logging": LoggingSpec,
    "alarms": AlarmSpec,
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
        rows = [f"  {name:<28} {_command(file.read_text())}" for name, file in shipped().items()]
        blocks.append("\n".join(["recipes", *rows]))
    for plural, family in FAMILIES.items():
        if wanted in (None, plural):
            blocks.append("\n".join([plural, *(line for _, spec in family.items() for line in _member(spec))]))
    for key, section in SECTIONS.items():
        if wanted in (None, key):
            blocks.append("\n".join([f"{key}: {_first_line(section)}", *_fields(section)]))
    return "\n\n".join(blocks)


def _command(text: str) -> str:
    """The second comment line of a recipe says what it is for."""
    comments = [line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")]
    return comments[1] if len(comments) > 1 else ""


def _member(spec: type[Spec]) -> list[str]:
    kind = spec.model_fields["kind"].default
    return [f"  {kind:<20} {_first_line(spec)}", *_fields(spec)]


def _first_line(spec: type[Spec]) -> str:
    return (spec.__doc__ or "").strip().splitlines()[0]


def _fields(spec: type[Spec]) -> list[str]:
    lines = []
    for name, field in spec.model_fields.items():
        if name != "kind":
            default = "required" if field.is_required() else _shown(field)
            lines.append(f"      {name:<24} {default:<14} {' '.join((field.description or '').split())}")
    return lines


def _shown(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    if isinstance(value, Spec):
        return str(getattr(value, "kind", "{...}"))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(str(getattr(item, "kind", item)) for item in value) + "]"
    return "unset" if value is None else str(value).replace("True", "true").replace("False", "false")


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
