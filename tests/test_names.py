"""Names and words of the parts that a recipe can choose: kind, file and class agree, and everything is explained."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from distill.core.spec import Spec
from distill.listing import SECTIONS
from distill.recipe import FAMILIES, Recipe

MEMBERS = [(plural, kind, spec) for plural, family in FAMILIES.items() for kind, spec in family.items()]
METHODS = ("losses", "criteria", "quantizers")

member = pytest.mark.parametrize(("plural", "kind", "spec"), MEMBERS, ids=[f"{p}-{k}" for p, k, _ in MEMBERS])


@member
def test_kind_file_and_class_agree(plural: str, kind: str, spec: type[Spec]) -> None:
    assert spec.model_fields["kind"].default == kind
    assert spec.__module__.removesuffix(".spec").rpartition(".")[2] == kind  # a file, or a folder with a spec.py
    assert spec.__name__.lower() == kind.replace("_", "")


@member
def test_a_method_is_also_a_function_of_its_name(plural: str, kind: str, spec: type[Spec]) -> None:
    if plural in ("losses", "criteria"):
        assert callable(getattr(sys.modules[spec.__module__], kind))


@member
def test_says_what_it_is(plural: str, kind: str, spec: type[Spec]) -> None:
    first = (spec.__dict__.get("__doc__") or "").strip().splitlines()
    assert first, f"{spec.__name__} has no docstring of its own"
    assert first[0].endswith(".")


@member
def test_says_where_it_is_from_or_when_to_use_it(plural: str, kind: str, spec: type[Spec]) -> None:
    words = sys.modules[spec.__module__].__doc__ or ""
    assert len(words) > 40
    if plural in METHODS:
        assert re.search(r"Source:|arXiv|baseline|control", words), f"{spec.__module__}: no source and no reason"


def _specs(spec: type[Spec]) -> set[type[Spec]]:
    """A Spec and every Spec that its fields can hold."""
    found: set[type[Spec]] = set()
    todo: list[Any] = [spec]
    while todo:
        item = todo.pop()
        if isinstance(item, type) and issubclass(item, Spec):
            if item not in found:
                found.add(item)
                todo += [field.annotation for field in item.model_fields.values()]
        else:
            todo += getattr(item, "__args__", ())
    return found


ALL = set().union(*(_specs(spec) for spec in (Recipe, *(spec for _, _, spec in MEMBERS))))


@pytest.mark.parametrize("spec", sorted(ALL, key=lambda spec: spec.__name__), ids=lambda spec: spec.__name__)
def test_every_field_is_explained(spec: type[Spec]) -> None:
    lacking = [name for name, field in spec.model_fields.items() if name != "kind" and not field.description]
    assert lacking == []


def test_every_section_can_be_listed() -> None:
    families = {spec for spec in ALL if any(issubclass(one, spec) for _, _, one in MEMBERS)}
    assert ALL - families - {Recipe} == {*SECTIONS.values()}
