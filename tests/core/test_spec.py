"""Specs and families: unknown keys, bare kinds, names that are taken."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from distill.core.spec import Family, Spec


class Round(Spec):
    """A circle."""

    kind: Literal["round"] = "round"
    radius: float = 1.0
    """Half its width."""


class Square(Spec):
    """A square."""

    kind: Literal["square"] = "square"
    side: int
    """Its width."""


SHAPES = Family("shape", Round, Square)


class Drawing(BaseModel):
    shapes: list[Annotated[Spec, SHAPES]]


def draw(*shapes: Any) -> list[Any]:
    return Drawing.model_validate({"shapes": list(shapes)}).shapes


def test_a_bare_kind_is_a_member_with_its_defaults() -> None:
    assert draw("round", {"kind": "square", "side": 2}) == [Round(), Square(side=2)]


def test_a_member_itself_is_taken() -> None:
    assert draw(Round(radius=2.0)) == [Round(radius=2.0)]


@pytest.mark.parametrize("wrong", ["oval", {"kind": "oval"}, {"radius": 1}, 3, None, ["round"]])
def test_no_such_kind(wrong: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        draw(wrong)
    assert [error["type"] for error in caught.value.errors()] == ["no_such_shape"]


def test_a_bare_kind_that_needs_settings_says_which() -> None:
    with pytest.raises(ValidationError) as caught:
        draw("square")
    assert caught.value.errors()[0]["loc"][-1] == "side"


@pytest.mark.parametrize("wrong", [{"kind": "round", "colour": "red"}, {"kind": "round", "radius": float("nan")}])
def test_a_spec_refuses_what_it_does_not_know_and_what_is_no_number(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        draw(wrong)


def test_a_spec_is_frozen_and_explained() -> None:
    with pytest.raises(ValidationError):
        Round().radius = 2.0  # type: ignore[misc]
    assert Round.model_fields["radius"].description == "Half its width."


def test_a_family_is_an_ordered_list() -> None:
    assert list(SHAPES) == ["round", "square"]
    assert len(SHAPES) == 2
    assert SHAPES["square"] is Square
    assert SHAPES.items() == [("round", Round), ("square", Square)]


def test_a_kind_is_there_once() -> None:
    class Other(Spec):
        kind: Literal["round"] = "round"

    with pytest.raises(ValueError, match=r"shape 'round' is there already: Round"):
        Family("shape", Round, Other)


def test_a_member_needs_a_kind() -> None:
    class Nameless(Spec):
        size: int = 1

    class Required(Spec):
        kind: Literal["required"]

    for member in (Nameless, Required):
        with pytest.raises(ValueError, match="needs a field kind"):
            Family("shape", member)


def test_the_schema_lists_every_member() -> None:
    schema = TypeAdapter(Annotated[Spec, SHAPES]).json_schema()
    assert schema["oneOf"] == [{"$ref": "#/$defs/Round"}, {"$ref": "#/$defs/Square"}]
