"""Specs and families: how every interchangeable part of the project is named, configured and found.

A *Spec* is a frozen pydantic model that refuses unknown keys; it stands beside the function that it configures. A
*Family* is an explicit list of Specs that can stand in the same place of a recipe, told apart by their ``kind``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import core_schema

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What is the name of a folder too; messages say it in words."""
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
"""Where a model runs, as PyTorch writes it."""


class Spec(BaseModel):
    """Configuration of one component. Unknown keys are mistakes; the line below a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Family:
    """An explicit, ordered list of Specs, one of which a recipe picks by ``kind``.

    Use it as an annotation: ``losses: list[Annotated[LossSpec, LOSSES]]``. In a recipe a member without settings may be
    written as its bare kind (``criterion: activation``).

    Args:
        noun: what a member is called in messages, such as ``"loss"``.
        members: the Spec classes; each has a field ``kind: Literal["..."]`` with that literal as its default.
    """

    def __init__(self, noun: str, *members: type[Spec]):
        self.noun = noun
        self._members: dict[str, type[Spec]] = {}
        for member in members:
            self.register(member)

    def register(self, member: type[Spec]) -> None:
        """Add a member. Must happen before a Recipe class that uses the family is defined.

        Raises:
            ValueError: the kind is taken, or the member has no default kind.
        """
        kind = member.model_fields["kind"].default if "kind" in member.model_fields else None
        if not isinstance(kind, str):
            raise ValueError(f"{member.__name__} needs a field kind: Literal['...'] = '...'")
        if kind in self._members:
            raise ValueError(f"{self.noun} {kind!r} is there already: {self._members[kind].__name__}")
        self._members[kind] = member

    def __getitem__(self, kind: str) -> type[Spec]:
        return self._members[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def items(self) -> list[tuple[str, type[Spec]]]:
        """(kind, Spec class) of every member, in the order of the list."""
        return list(self._members.items())

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """A union told apart by ``kind``; a bare string stands for a member with its defaults."""
        choices = {kind: handler.generate_schema(member) for kind, member in self._members.items()}

        def kind_of(value: Any) -> Any:
            return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)

        union = core_schema.tagged_union_schema(
            choices,
            kind_of,
            custom_error_type=f"no_such_{self.noun}",
            custom_error_message=f"no such {self.noun}",
            metadata={"family": self.noun},
        )
        return core_schema.no_info_before_validator_function(
            lambda value: {"kind": value} if isinstance(value, str) else value, union
        )
