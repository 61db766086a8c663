"""A setting of a loss that changes during the run: written in place of the number.

    value(step) = start + (end - start) * shape(done),   done = min(1, step / (share * num_steps))
    shape(x) = x (linear),  (1 - cos(pi x)) / 2 (cosine),  0 (constant)

Steps count from 0. It depends on nothing but the step, so a run that goes on from a checkpoint meets the same values.
Prefer a number; a schedule pays where the start and the end of training want different things: a soft teacher first
(temperature from 4 to 1), or the text itself at last (the weight of cross_entropy from 0 to 1).

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


class Schedule(Spec):
    """A number that moves from ``start`` to ``end`` during the run."""

    kind: Literal["linear", "cosine", "constant"]
    """Course between the two; constant stays at start, as the bare number does."""
    start: float
    """Value of the first step."""
    end: float | None = None
    """Value when the share of the run is over; unset only for constant."""
    share: float = Field(1.0, gt=0, le=1)
    """Part of the stage's steps in which the value moves; after it the value stays. 1 is the whole stage."""

    @model_validator(mode="after")
    def _has_an_end(self) -> Schedule:
        if (self.end is None) != (self.kind == "constant"):
            raise ValueError(
                "kind: constant stays at start; leave end out, or take linear or cosine"
                if self.end is not None
                else f"kind: {self.kind} needs an end"
            )
        return self

    def at(self, step: int, num_steps: int) -> float:
        """The value with which optimizer step ``step`` (from 0) of ``num_steps`` is made."""
        if self.end is None:
            return self.start
        done = min(1.0, step / (self.share * max(1, num_steps)))
        shape = 0.5 * (1 - math.cos(math.pi * done)) if self.kind == "cosine" else done
        low, high = sorted((self.start, self.end))
        # only the ends were held against the setting's bounds, so rounding must not carry a value past them
        return min(max((1 - shape) * self.start + shape * self.end, low), high)


class Within:
    """Annotation of a setting that is a number within bounds, or a schedule whose both ends are.

    A union of pydantic would report a mistake once for each form that a value could have had; this looks at the form
    first.

    Args:
        to_zero: a schedule may also start or end at 0, which as a number would be refused as a loss that is never on.
        bounds: ``gt``, ``ge``, ``lt``, ``le``, as in pydantic.
    """

    def __init__(self, *, to_zero: bool = False, **bounds: float):
        self.bounds = bounds
        self.ends = {"ge": 0.0} if to_zero else bounds

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Both forms for the JSON schema and for writing, one at a time for reading."""
        number = core_schema.float_schema(allow_inf_nan=False, **self.bounds)  # type: ignore[arg-type]
        end = core_schema.float_schema(allow_inf_nan=False, **self.ends)  # type: ignore[arg-type]
        of_number, of_end = SchemaValidator(number), SchemaValidator(end)

        def read(value: Any, _: Callable[[Any], Any]) -> float | Schedule:
            if not isinstance(value, dict | Schedule):
                if isinstance(value, int | float | str):
                    return float(of_number.validate_python(value))
                raise PydanticCustomError("number_or_schedule", "needs a number or a schedule {kind, start, end}")
            schedule = Schedule.model_validate(value)
            for name in ("start", "end"):
                if getattr(schedule, name) is not None:
                    _check(of_end, getattr(schedule, name), name)
            return schedule

        forms = core_schema.union_schema([number, handler.generate_schema(Schedule)])
        return core_schema.no_info_wrap_validator_function(read, forms)


def _check(bounds: SchemaValidator, value: float, key: str) -> None:
    """Raise the error of a number at the place of its key."""
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
    """A setting that has to be a number by now.

    Raises:
        ValueError: it is still a schedule; ``loss.at(step, num_steps)`` has its values.
    """
    if isinstance(setting, Schedule):
        raise ValueError(f"{setting!r} has no value without a step: call loss.at(step, num_steps) first")
    return setting
