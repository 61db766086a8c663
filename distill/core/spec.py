"""Specs and families: how every interchangeable part of the project is named, configured and found.

A *Spec* is a frozen pydantic model that refuses unknown keys; it stands beside the function that it configures. A
*Family* is an explicit list of Specs that can stand in the same place of a recipe, told apart by their ``kind``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, PydanticKnownError, core_schema

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""What is the name of a folder too; messages say it in words. File systems end at 255 bytes, and names of files are
made of several of these."""
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
"""What is the name of an environment variable."""
HUB_REPOSITORY = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
"""What is the name of a repository of the Hub."""
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
"""Where a model runs, as PyTorch writes it."""


LARGEST = 2**63 - 1
"""Whole numbers of a recipe fit 64 bits, as sizes and counts of libraries do."""


def number(value: Any, validate: Callable[[Any], Any]) -> Any:
    """What pydantic makes of a number, without its leniency.

    Args:
        value: as it was written.
        validate: pydantic's own validation.

    Raises:
        PydanticKnownError: true or false in place of a number.
    """
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return validate(value)


def whole_number(value: Any, validate: Callable[[Any], Any]) -> Any:
    """:func:`number` for whole ones.

    Raises:
        PydanticKnownError: true or false in place of a number.
        PydanticCustomError: it does not fit 64 bits.
    """
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    made: int = validate(value)
    if abs(made) > LARGEST:
        raise PydanticCustomError("too_large", "must be less than 2**63")
    return made


_NUMBERS = {"int": whole_number, "float": number}
_NO_SCHEMAS = {"cls", "config", "default", "function", "metadata", "serialization"}


def _with_plain_numbers(schema: Any) -> Any:
    if isinstance(schema, list | tuple):
        return type(schema)(_with_plain_numbers(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    if any(schema.get("function") == {"type": "no-info", "function": function} for function in _NUMBERS.values()):
        return schema
    if schema.get("type") in _NUMBERS:
        return core_schema.no_info_wrap_validator_function(_NUMBERS[schema["type"]], schema)
    return {key: part if key in _NO_SCHEMAS else _with_plain_numbers(part) for key, part in schema.items()}


class Spec(BaseModel):
    """Configuration of one component. Unknown keys are mistakes; the line below a field is its documentation.

    Numbers are numbers: ``true`` is none, though Python takes it for 1, and whole ones fit 64 bits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Pydantic's own, with :func:`number` or :func:`whole_number` around each number."""
        schema: core_schema.CoreSchema = _with_plain_numbers(handler(source))
        return schema


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

    @classmethod
    def among(cls, noun: str, names: Mapping[str, Any], *bases: type[Spec]) -> Family:
        """The Specs with a kind that a module has imported, in that order: to add a member is to import it there.

        Args:
            noun: what a member is called in messages.
            names: ``globals()`` of the module.
            bases: what the members are subclasses of.
        """
        specs = [found for found in names.values() if isinstance(found, type) and issubclass(found, bases)]
        return cls(noun, *(spec for spec in specs if isinstance(spec.model_fields["kind"].default, str)))

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
