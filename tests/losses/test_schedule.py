"""Values of a schedule, and what a recipe may write in place of a number."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
from pydantic import ValidationError

from distill.core.errors import RecipeError
from distill.losses import LOSSES, CrossEntropy, ForwardKL, JensenShannon, Schedule
from distill.losses.schedule import number
from distill.recipe import Recipe


def values(steps: int, *asked: int, **settings: Any) -> list[float]:
    schedule = Schedule(**settings)
    return [schedule.at(step, steps) for step in asked]


def test_linear_goes_straight_from_start_to_end_and_stays() -> None:
    assert values(4, 0, 1, 2, 3, 4, 99, kind="linear", start=1, end=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert values(4, 0, 2, 4, kind="linear", start=-1, end=1) == pytest.approx([-1, 0, 1])


def test_cosine_is_slow_at_both_ends() -> None:
    found = values(8, *range(9), kind="cosine", start=4, end=2)
    assert found[0] == 4
    assert found[2] == pytest.approx(3 + math.sqrt(0.5))
    assert found[4] == pytest.approx(3)
    assert found[8] == pytest.approx(2)
    steps = [a - b for a, b in itertools.pairwise(found)]
    assert steps[0] == pytest.approx(min(steps))
    assert steps[3] == pytest.approx(max(steps))


def test_constant_is_the_number() -> None:
    assert values(4, 0, 3, 4, kind="constant", start=0.7) == [0.7, 0.7, 0.7]


def test_a_share_ends_the_course_before_the_run() -> None:
    assert values(8, 0, 2, 4, 5, 8, kind="linear", start=1, end=0, share=0.5) == pytest.approx([1, 0.5, 0, 0, 0])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_both_ends_are_met_exactly_and_nothing_lies_beyond_them(kind: Any) -> None:
    """Bounds are checked at the ends only, so a value between must not step over them."""
    for start, end in ((0.1, 0.7), (0.3, 1e-9), (0.999999, 0.1), (3.0, 3.0)):
        found = values(997, *range(999), kind=kind, start=start, end=end)
        assert (found[0], found[-1]) == (start, end)
        assert min(start, end) <= min(found)
        assert max(found) <= max(start, end)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "linear", "start": 1}, "kind: linear needs an end"),
        ({"kind": "cosine", "start": 1}, "kind: cosine needs an end"),
        ({"kind": "constant", "start": 1, "end": 2}, "has no end; remove end"),
        ({"kind": "linear", "start": 1, "end": 2, "share": 0}, "greater than 0"),
        ({"kind": "linear", "start": 1, "end": 2, "share": 1.5}, "less than or equal to 1"),
        ({"kind": "linear", "start": 1, "end": math.inf}, "finite"),
        ({"kind": "step", "start": 1, "end": 2}, "'linear', 'cosine' or 'constant'"),
        ({"kind": "linear", "from": 1, "to": 2}, "start"),
    ],
)
def test_a_schedule_without_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Schedule(**settings)


@pytest.mark.parametrize(
    ("spec", "settings", "place"),
    [
        (ForwardKL, {"temperature": {"kind": "linear", "start": 2, "end": 0}}, ("temperature", "end")),
        (ForwardKL, {"weight": {"kind": "linear", "start": -1, "end": 1}}, ("weight", "start")),
        (ForwardKL, {"weight": {"kind": "constant"}}, ("weight", "start")),
        (JensenShannon, {"beta": {"kind": "cosine", "start": 0.1, "end": 1}}, ("beta", "end")),
        (JensenShannon, {"beta": 0}, ("beta",)),
        (JensenShannon, {"beta": 1.0}, ("beta",)),
        (ForwardKL, {"weight": [1]}, ("weight",)),
        (ForwardKL, {"weight": None}, ("weight",)),
        (ForwardKL, {"temperature": math.nan}, ("temperature",)),
    ],
)
def test_bounds_hold_for_both_ends_and_are_named_once(spec: Any, settings: dict[str, Any], place: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**settings)
    assert [error["loc"] for error in caught.value.errors()] == [place]


def test_a_weight_may_fade_to_nothing_but_not_be_nothing() -> None:
    fading = CrossEntropy.model_validate({"weight": {"kind": "linear", "start": 1, "end": 0}})
    assert [fading.at(step, 2).weight for step in (0, 1, 2)] == [1, 0.5, 0]
    with pytest.raises(ValidationError):
        CrossEntropy(weight=0)


def test_at_gives_numbers_and_leaves_the_loss_as_it_is() -> None:
    loss = ForwardKL(weight=0.5, temperature=Schedule(kind="linear", start=4, end=2))
    assert loss.at(1, 2) == ForwardKL(weight=0.5, temperature=3)
    assert loss.schedules() == {"temperature": Schedule(kind="linear", start=4, end=2)}
    plain = ForwardKL(weight=0.5)
    assert plain.at(1, 2) is plain


def test_a_schedule_has_no_value_without_a_step() -> None:
    assert number(0.5) == 0.5
    with pytest.raises(ValueError, match=r"call loss\.at\(step, num_steps\) first"):
        number(Schedule(kind="constant", start=1))


@pytest.mark.parametrize("kind", list(LOSSES))
def test_a_loss_with_schedules_is_written_and_read_back(kind: str) -> None:
    """A stage's hash and the resolved recipe are made of this text."""
    loss = LOSSES[kind].model_validate({"kind": kind, "weight": {"kind": "cosine", "start": 1, "end": 0.3}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = loss.model_dump_json()
    assert '"weight":{"kind":"cosine","start":1.0,"end":0.3,"share":1.0}' in text
    assert LOSSES[kind].model_validate_json(text) == loss


RECIPE = """name: a
teacher: org/model
data: {train: python_docs, sequence_length: 16}
stages:
  distill:
    student: org/small
    num_steps: 1
    losses:
      - kind: forward_kl
        temperature:
          kind: linear
          start: 4
          END
"""


def test_a_recipe_takes_it_and_names_mistakes_at_their_line() -> None:
    recipe = Recipe.from_text(RECIPE.replace("END", "end: 1"))
    assert recipe.stages["distill"].losses[0].temperature.at(1, 2) == 2.5  # type: ignore[attr-defined]
    assert Recipe.from_text(recipe.dump()) == recipe
    for written, said in (
        ("end: 0", r"recipe:13: stages\.distill\.losses\.0\.temperature\.end: .*greater than 0 \(got 0(\.0)?\)$"),
        ("ende: 1", r"recipe:13: stages\.distill\.losses\.0\.temperature\.ende: unknown key.*did you mean.*end"),
        ("share: 0.5", r"temperature: kind: linear needs an end"),
    ):
        with pytest.raises(RecipeError, match=said):
            Recipe.from_text(RECIPE.replace("END", written))
