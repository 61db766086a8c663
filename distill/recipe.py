"""The recipe: one YAML file, a whole run, with every mistake reported at once and at its line."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from distill.core.errors import RecipeError
from distill.core.mistakes import blamed, mistakes_of
from distill.core.secrets import secrets_in
from distill.core.source import KeyPath, Source, parse, read, suggest
from distill.core.spec import NAME, Family, Spec
from distill.data import SOURCES
from distill.data.spec import DataSpec
from distill.data.teacher_cache import CODECS
from distill.exporters import EXPORTERS
from distill.losses import LOSSES
from distill.pruning import CRITERIA
from distill.quantization import ACTIVATIONS, QUANTIZERS
from distill.stages import STAGES, StageSpec
from distill.stages.cache_teacher import NO_STREAM, CacheTeacher
from distill.tracking.spec import LoggingSpec
from distill.training.spec import ComputeSpec, DistillSpec, OnPolicySpec

FAMILIES: dict[str, Family] = {
    "stages": STAGES,
    "losses": LOSSES,
    "criteria": CRITERIA,
    "quantizers": QUANTIZERS,
    "activations": ACTIVATIONS,
    "sources": SOURCES,
    "codecs": CODECS,
    "exporters": EXPORTERS,
}
"""Every family, by the plural that ``distill list`` takes."""

RESERVED = {"teacher", "self", "data", "scores", "wandb", "comparison"}
"""What a stage cannot be called: a model's reference, and folders of a run that are no stage's."""


class Recipe(Spec):
    """A whole run: from which teacher, on which text, by which stages, on which machine."""

    name: str = Field(pattern=NAME)
    """Name of the run; its folder is runs/<name> unless --run-dir says otherwise."""
    teacher: str | None = None
    """The big model: a Hub id, a folder, or builtin:NAME. Unset when no stage needs one."""
    data: DataSpec
    """The text."""
    seed: int = 0
    """Decides the order of samples and every random weight."""
    compute: ComputeSpec = ComputeSpec()
    """The machine; nothing here changes what a run means."""
    logging: LoggingSpec = LoggingSpec()
    """Where the figures go besides the run folder."""
    stages: dict[str, Annotated[StageSpec, STAGES]] = Field(min_length=1)
    """The steps, in order; a stage's name is its address and its kind defaults to the name."""

    @model_validator(mode="before")
    @classmethod
    def _kind_is_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("stages"), dict):
            stages = {
                name: {"kind": name, **(stage or {})} if isinstance(stage, dict | None) else stage
                for name, stage in value["stages"].items()
            }
            return {**value, "stages": stages}
        return value

    @classmethod
    def load(cls, file: str | Path, set: Iterable[str] = ()) -> Recipe:
        """Read, override and check a recipe.

        Args:
            file: path of the YAML file.
            set: overrides such as ``"stages.distill.optimizer.lr=5e-5"``.

        Raises:
            RecipeError: with every mistake, as ``file:line: key: what``.
        """
        return cls._read(lambda overrides: read(file, overrides), list(set))

    @classmethod
    def from_text(cls, text: str, name: str = "recipe", set: Iterable[str] = ()) -> Recipe:
        """As :meth:`load`, for text in memory."""
        return cls._read(lambda overrides: parse(text, name, overrides), list(set))

    @classmethod
    def _read(cls, source: Callable[[list[str]], Source], overrides: list[str]) -> Recipe:
        """Read, override and check."""

        def mistakes(some: list[str]) -> list[str]:
            try:
                cls.from_source(source(some))
            except RecipeError as error:
                return error.mistakes
            return []

        try:
            return cls.from_source(source(overrides))
        except RecipeError as error:
            raise RecipeError(blamed(error.mistakes, overrides, mistakes)) from None

    @classmethod
    def from_source(cls, source: Source) -> Recipe:
        """Validate what :func:`distill.core.source.read` gave."""
        try:
            recipe = cls.model_validate(source.data)
        except ValidationError as error:
            kinds = {family.noun: list(family) for family in FAMILIES.values()}
            fields = lambda path: _fields_at(source.data, path)  # noqa: E731
            raise RecipeError(mistakes_of(error, source, fields, kinds)) from None
        if mistakes := list(recipe._mistakes(source)):
            raise RecipeError(mistakes)
        return recipe

    def dump(self) -> str:
        """The recipe with every value written out, as YAML that loads to the same recipe."""
        return yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False, allow_unicode=True)

    def _mistakes(self, source: Source) -> Iterable[str]:
        """What pydantic cannot see: references between stages, settings without effect, secrets."""
        for where in secrets_in(source.data):
            yield (
                f"{source.at(where)}: holds a password or token, which the run would write down; leave it to the "
                "environment (HF_TOKEN, WANDB_API_KEY) or ~/.netrc"
            )
        earlier: list[str] = []
        for name, stage in self.stages.items():
            path: KeyPath = ("stages", name)
            if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                yield (
                    f"{source.at(path)}: {name!r} cannot be the name of a stage "
                    "(letters, digits, _ and -; " + ", ".join(sorted(RESERVED)) + " are taken)"
                )
            if isinstance(stage, CacheTeacher) and self.data.train.is_stream():
                yield f"{source.at(path)}: {NO_STREAM}"
            for key, reference in stage.references():
                yield from self._reference_mistakes(source, (*path, *key), reference, earlier)
            if isinstance(stage, DistillSpec) and stage.on_policy is not None:
                yield from self._own_sequence_mistakes(source, (*path, "on_policy"), stage.on_policy)
            earlier.append(name)
        if self.teacher is not None and not _may_be_model(self.teacher):
            yield f"{source.at(('teacher',))}: no folder {self.teacher!r} here, and a Hub id is <who>/<model>"
        if self.data.tokenizer == "teacher" and self.teacher is None:
            yield (
                f"{source.at(('data', 'tokenizer'))}: there is no teacher to take it from; name a model or write "
                "tokenizer: {vocab_size: 2048} to train one"
            )
        if (
            self.teacher is not None
            and self.data.tokenizer != "teacher"
            and not any(reference == "teacher" for stage in self.stages.values() for _, reference in stage.references())
        ):
            yield f"{source.at(('teacher',))}: no stage uses it; remove it"

    def _reference_mistakes(self, source: Source, path: KeyPath, reference: str, earlier: list[str]) -> Iterable[str]:
        at = f"{source.at(path)}: "
        if reference == "teacher":
            if self.teacher is None:
                yield at + "the recipe names no teacher; add teacher: <Hub id or folder>"
        elif reference in self.stages:
            if reference not in earlier:
                yield at + f"{reference!r} must stand before this stage"
            elif self.stages[reference].makes_signal and path[-1] == "teacher":
                yield from self._signal_mistakes(path, reference, at)
            elif not self.stages[reference].makes_model:
                yield at + f"{reference!r} is of kind {self.stages[reference].kind}, which makes no model"
        elif not _may_be_model(reference):
            models = ["teacher", *(name for name in earlier if self.stages[name].makes_model)]
            yield (
                at
                + f"no earlier stage, folder or Hub id {reference!r} (models here: {', '.join(models)})"
                + suggest(reference, models)
            )

    def _own_sequence_mistakes(self, source: Source, path: KeyPath, policy: OnPolicySpec) -> Iterable[str]:
        """Own sequences that are longer than the text's blocks, for which memory and positions are meant."""
        if (wanted := policy.num_tokens()) > self.data.sequence_length:
            yield (
                f"{source.at(path)}: prompt_tokens ({policy.prompt_tokens}) + max_new_tokens "
                f"({policy.max_new_tokens}) = {wanted} must fit a block of data.sequence_length "
                f"({self.data.sequence_length}); lower one of them or raise it"
            )

    def _signal_mistakes(self, path: KeyPath, reference: str, at: str) -> Iterable[str]:
        """What a stage asks of a cached teacher and cannot have."""
        cache, stage = self.stages[reference], self.stages[str(path[1])]
        if isinstance(cache, CacheTeacher):
            if stage.makes_signal:
                yield at + f"{reference!r} is a cache already; name its teacher"
            elif why := cache.refuses(getattr(stage, "losses", [])):
                yield at + why
            elif getattr(stage, "on_policy", None) is not None:
                yield (
                    at + f"{reference!r} holds what its teacher says of the text, and on_policy asks about sequences "
                    "that do not exist yet; name its teacher here, or remove on_policy"
                )


def _may_be_model(reference: str) -> bool:
    """Whether it can be looked for: a folder, a path, a Hub id or a builtin."""
    return "/" in reference or ":" in reference or Path(reference).is_dir()


def _fields_at(data: Any, path: KeyPath) -> list[str]:
    """Keys that are legal at a path of the recipe, following kinds as they were written."""
    spec: Any = Recipe
    for part in path:
        annotation: Any = None
        if isinstance(spec, type) and issubclass(spec, Spec):
            if part not in spec.model_fields:
                return []
            field = spec.model_fields[str(part)]
            families = [item for item in field.metadata if isinstance(item, Family)]
            annotation = families[0] if families else field.annotation
        else:
            annotation = spec
            spec = None
        data = _item(data, part)
        spec = _narrow(annotation, data, part)
    return list(spec.model_fields) if isinstance(spec, type) and issubclass(spec, Spec) else []


def _item(data: Any, part: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(part)
    return data[part] if isinstance(data, list) and isinstance(part, int) and part < len(data) else None


def _narrow(annotation: Any, data: Any, part: str | int) -> Any:
    """From an annotation to the Spec that the value at hand is checked against, or to the annotation of its items."""
    if isinstance(annotation, Family):
        kind = data.get("kind", part) if isinstance(data, dict) else None
        return annotation[kind] if kind in list(annotation) else None
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return annotation
    if typing.get_origin(annotation) is Annotated:
        families = [item for item in typing.get_args(annotation)[1:] if isinstance(item, Family)]
        return _narrow(families[0] if families else typing.get_args(annotation)[0], data, part)
    if typing.get_origin(annotation) in (dict, list, tuple):
        return typing.get_args(annotation)[-1]
    options = [_narrow(option, data, part) for option in typing.get_args(annotation) if option is not type(None)]
    return next((option for option in options if option is not None and not isinstance(option, str)), None)
