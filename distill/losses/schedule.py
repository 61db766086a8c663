"""A schedule for a setting of a loss; in a recipe it stands in place of the number.

    value(step) = start + (end - start) * shape(done),   done = min(1, step / (share * num_steps))
    shape(x) = x (linear),  (1 - cos(pi x)) / 2 (cosine),  0 (constant)

Steps count from 0. The value depends only on the step, so a resumed run has the same values. A constant number is
enough for most runs. A schedule helps if the start and the end of training need different settings: a high temperature
first (from 4 to 1), or cross-entropy at the end (its weight from 0 to 1).

Source: Jafari et al. 2021, arXiv 2104.07163 (annealed temperature); Clark et al. 2019, arXiv 1907.04829 (teacher
annealing: weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, SchemaValidator, core_schema

from distill.core.spec import Spec
from distill.core.spec import number as plain_number


class Schedule(Spec):
    """A number that moves from ``start`` to ``end`` during the run."""

    kind: Literal["linear", "cosine", "constant"]
    """Shape of the curve between start and end; constant stays at start, like a plain number."""
    start: float
    """Value at the first step."""
    end: float | None = None
    """Value after ``share`` of the steps; required unless the kind is constant."""
    share: float = Field(1.0, gt=0, le=1)
    """Fraction of the stage's steps during which the value changes; then it stays at ``end``. 1 is the whole stage."""

    @model_validator(mode="after")
    def _has_an_end(self) -> Schedule:
        if (self.end is None) != (self.kind == "constant"):
            raise ValueError(
                "kind: constant has no end; remove end, or use linear or cosine"
                if self.end is not None
                else f"kind: {self.kind} needs an end"
            )
        return self

    def at(self, step: int, num_steps: int) -> float:
        """The value at optimizer step ``step`` (from 0) of ``num_steps``."""
        if self.end is None:
            return self.start
        done = min(1.0, step / (self.share * max(1, num_steps)))
        shape = 0.5 * (1 - math.cos(math.pi * done)) if self.kind == "cosine" else done
        low, high = sorted((self.start, self.end))
        # only start and end were validated against the bounds, so rounding must not exceed them
        return min(max((1 - shape) * self.start + shape * self.end, low), high)


class Within:
    """Annotation of a setting that is a number within bounds, or a schedule whose start and end are within them.

    A pydantic union reports a mistake once per form that a value could have. This checks the form first.

    Args:
        to_zero: whether a schedule may start or end at 0. A number 0 is an error then, because the loss would have no
            effect.
        bounds: ``gt``, ``ge``, ``lt``, ``le``, as in pydantic.
    """

    def __init__(self, *, to_zero: bool = False, **bounds: float):
        self.bounds = bounds
        self.ends = {"ge": 0.0} if to_zero else bounds

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """A union of both forms for the JSON schema and for serialization; validation checks one form only."""
        number = core_schema.float_schema(allow_inf_nan=False, **self.bounds)  # type: ignore[arg-type]
        end = core_schema.float_schema(allow_inf_nan=False, **self.ends)  # type: ignore[arg-type]
        of_number, of_end = SchemaValidator(number), SchemaValidator(end)

        def read(value: Any, _: Callable[[Any], Any]) -> float | Schedule:
            if not isinstance(value, dict | Schedule):
                if isinstance(value, int | float | str):
                    return float(plain_number(value, of_number.validate_python))
                raise PydanticCustomError("number_or_schedule", "needs a number or a schedule {kind, start, end}")
            schedule = Schedule.model_validate(value)
            for name in ("start", "end"):
                if getattr(schedule, name) is not None:
                    _check(of_end, getattr(schedule, name), name)
            return schedule

        forms = core_schema.union_schema([number, handler.generate_schema(Schedule)])
        return core_schema.no_info_wrap_validator_function(read, forms)


def _check(bounds: SchemaValidator, value: float, key: str) -> None:
    """Raise pydantic's error for a number that is out of bounds, with ``key`` as its location."""
    try:
        bounds.validate_python(value)
    except ValidationError as error:
        (one,) = error.errors()
        details = InitErrorDetails(type=one["type"], loc=(key,), input=value, ctx=one.get("ctx", {}))
        raise ValidationError.from_exception_data("Schedule", [details]) from None


Weight = Annotated[float | Schedule, Within(gt=0, to_zero=True)]
Positive = Annotated[float | Schedule, Within(gt=0)]
NotNegative = Annotated[float | Schedule, Within(ge=0)]
Fraction = Annotated[float | Schedule, Within(gt=0, lt=1)]
Share = Annotated[float | Schedule, Within(ge=0, le=1)]


def number(setting: float | Schedule) -> float:
    """The value of a setting that is not a schedule.

    Raises:
        ValueError: it is a schedule; ``loss.at(step, num_steps)`` returns a loss with its value.
    """
    if isinstance(setting, Schedule):
        raise ValueError(f"{setting!r} has no value without a step: call loss.at(step, num_steps) first")
    return setting
