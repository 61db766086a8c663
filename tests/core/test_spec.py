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


def _specs(base: type[Spec] = Spec) -> list[type[Spec]]:
    import distill.recipe  # noqa: F401 - which imports every one

    return [base, *(found for spec in base.__subclasses__() for found in _specs(spec))]


def test_true_is_no_number_anywhere() -> None:
    """Python takes it for 1, and pydantic would: ``lr: true`` would train with a learning rate of 1."""
    looked_at = 0
    for spec in _specs():
        if not spec.__module__.startswith("distill."):
            continue
        for name in spec.model_fields:
            if all(refused_at(spec, name, number) for number in (3, 0.5)) or not refused_at(spec, name, "true"):
                continue  # it takes no number, or truth and texts as well
            looked_at += 1
            assert refused_at(spec, name, True), f"{spec.__name__}.{name} takes true for a number"
            assert refused_at(spec, name, 10**400), f"{spec.__name__}.{name} takes any number of digits"
    assert looked_at > 100


def refused_at(spec: type[Spec], name: str, value: Any) -> bool:
    """Whether validation finds this value wrong, whatever else the Spec would need."""
    try:
        spec.model_validate({name: value})
    except ValidationError as error:
        return any(item["loc"][:1] == (name,) for item in error.errors())
    return False


def test_a_number_in_a_list_a_mapping_or_a_schedule_is_one_too() -> None:
    from distill.losses import ForwardKL
    from distill.training.spec import OptimizerSpec

    for wrong in ((OptimizerSpec, {"betas": [True, 0.9]}), (ForwardKL, {"temperature": True})):
        with pytest.raises(ValidationError, match="valid number"):
            wrong[0].model_validate(wrong[1])
    with pytest.raises(ValidationError, match="valid number"):
        ForwardKL.model_validate({"temperature": {"kind": "linear", "start": True, "end": 2}})
    assert OptimizerSpec.model_validate({"lr": 1, "warmup_steps": "3"}) == OptimizerSpec(lr=1.0, warmup_steps=3)
