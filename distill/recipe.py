"""The recipe: one YAML file, a whole run, with every mistake reported at once and at its line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from distill.core.errors import RecipeError
from distill.core.mistakes import blamed, mistakes_of
from distill.core.outside import is_folder
from distill.core.secrets import secrets_in
from distill.core.source import KeyPath, Source, parse, read, suggest
from distill.core.spec import NAME, Family, Spec
from distill.core.tasks import MODEL_TASKS, CausalLM, ModelTask
from distill.data.chat_spec import ChatSpec
from distill.data.spec import TEXTS, DataSpec
from distill.data.teacher_cache import CODECS
from distill.evaluation.tasks import TASKS, TaskSpec
from distill.exporters import EXPORTERS
from distill.losses import LOSSES
from distill.pruning import CRITERIA
from distill.quantization import ACTIVATIONS, QUANTIZERS
from distill.reporting.require import OF_TASK, figure_name, parsed, split_key
from distill.stages import MAKERS, STAGES, StageSpec
from distill.stages.chat import first_student
from distill.stages.text import (
    ReadsText,
    data_of,
    made_sources,
    own_texts,
    text_made_by,
    with_inherited,
    with_made_forms,
)
from distill.tracking.spec import LoggingSpec
from distill.training.spec import BudgetSpec, ComputeSpec

FAMILIES: dict[str, Family] = {
    "stages": STAGES,
    "losses": LOSSES,
    "criteria": CRITERIA,
    "quantizers": QUANTIZERS,
    "activations": ACTIVATIONS,
    "sources": TEXTS,
    "codecs": CODECS,
    "exporters": EXPORTERS,
    "tasks": TASKS,
    "makers": MAKERS,
    "model_tasks": MODEL_TASKS,
}
"""Every family, by the plural that ``distill list`` takes."""

RESERVED = {"teacher", "self", "data", "scores", "wandb", "comparison"}
"""What a stage cannot be called: a model's reference, and folders of a run that are no stage's."""


WHAT_IS_SAID = ("train", "validation", "held_out", "chat", "clean", "augment")
"""Keys of a text that decide its tokens. Keys that only decide the rows do not matter to a teacher cache."""


class Recipe(Spec):
    """A whole run: its teacher, its text, its stages and its machine."""

    name: str = Field(pattern=NAME)
    """Name of the run. Its folder is runs/<name>, unless --run-dir is given."""
    teacher: str | None = None
    """The large model: a Hub id, a folder, or builtin:NAME. Unset if no stage needs one."""
    task: Annotated[ModelTask, MODEL_TASKS] = CausalLM()
    """Task on which models are trained and measured: causal_lm (the next token), masked_lm, classification, regression,
    token_classification or embedding, such as {kind: classification, label: label}."""
    data: DataSpec
    """Text for training and validation."""
    seed: int = 0
    """Seed of the order of samples and of all random weights."""
    compute: ComputeSpec = ComputeSpec()
    """Settings of the machine. They do not change what a run computes."""
    logging: LoggingSpec = LoggingSpec()
    """Logging in addition to the run folder."""
    require: dict[str, str] = Field({})
    """Bounds that the run must meet; otherwise it ends with exit code 3 after everything is saved. A key is a figure of
    the report or a task, such as arc_easy: ">= 0.97 of teacher". It refers to the last student, or to the model before
    a slash (int4/perplexity)."""
    stages: dict[str, Annotated[StageSpec, STAGES]] = Field(min_length=1)
    """The stages, in order. Other stages refer to a stage by its name; its kind defaults to the name."""

    @field_validator("require")
    @classmethod
    def _bounds(cls, require: dict[str, str]) -> dict[str, str]:
        for expression in require.values():
            parsed(expression)
        return require

    @model_validator(mode="before")
    @classmethod
    def _kind_is_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("stages"), dict):
            stages = {
                name: {"kind": name, **(stage or {})} if isinstance(stage, dict | None) else stage
                for name, stage in value["stages"].items()
            }
            forms = _made_forms(stages)
            for name, stage in stages.items():
                if isinstance(stage, dict) and "data" in stage:
                    own = with_inherited(stage["data"], value.get("data"))
                    stages[name] = {**stage, "data": with_made_forms(own, forms)}
            return {**value, "stages": stages}
        return value

    @model_validator(mode="before")
    @classmethod
    def _rows_of_a_task_are_padded(cls, value: Any) -> Any:
        """The default of ``packing`` where the task is not the next token."""
        task = value.get("task") if isinstance(value, dict) else None
        kind = task.get("kind") if isinstance(task, dict) else task
        if not isinstance(kind, str) or kind == "causal_lm":
            return value
        stages = value.get("stages")
        padded = {"data": _padded(value.get("data"))} if "data" in value else {}
        if isinstance(stages, dict):
            padded["stages"] = {
                name: {**stage, "data": _padded(stage["data"])}
                if isinstance(stage, dict) and "data" in stage
                else stage
                for name, stage in stages.items()
            }
        return {**value, **padded}

    @model_validator(mode="after")
    def _data_is_read_for_the_task(self) -> Recipe:
        if self.task.is_causal:
            return self
        data = self.data.for_task(self.task)
        stages = {
            name: stage.model_copy(update={"data": own.for_task(self.task)}) if isinstance(own, DataSpec) else stage
            for name, stage in self.stages.items()
            for own in [getattr(stage, "data", None)]
        }
        object.__setattr__(self, "data", data)  # frozen, and this is where it is made
        object.__setattr__(self, "stages", stages)
        return self

    @classmethod
    def load(cls, file: str | Path, set: Iterable[str] = ()) -> Recipe:
        """Read, override and check a recipe.

        Args:
            file: path of the YAML file.
            set: overrides such as ``"stages.distill.optimizer.lr=5e-5"``.

        Raises:
            RecipeError: with every mistake, as ``file:line: key: what``.
        """
        return cls._read(read(file), list(set))

    @classmethod
    def from_text(cls, text: str, name: str = "recipe", set: Iterable[str] = ()) -> Recipe:
        """As :meth:`load`, for text in memory."""
        return cls._read(parse(text, name), list(set))

    @classmethod
    def _read(cls, source: Source, overrides: list[str]) -> Recipe:
        """Override and check."""

        def mistakes(some: list[str]) -> list[str]:
            try:
                cls.from_source(source.overridden(some))
            except RecipeError as error:
                return error.mistakes
            return []

        try:
            return cls.from_source(source.overridden(overrides))
        except RecipeError as error:
            raise RecipeError(blamed(error.mistakes, overrides, mistakes)) from None

    @classmethod
    def from_source(cls, source: Source) -> Recipe:
        """Validate what :func:`distill.core.source.read` gave."""
        try:
            recipe = cls.model_validate(source.data)
        except ValidationError as error:
            raise RecipeError(mistakes_of(error, source, cls, list(FAMILIES.values()))) from None
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
            if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
                yield (
                    f"{source.at(path)}: {name!r} cannot be the name of a stage "
                    "(at most 100 letters, digits, _ and -; " + ", ".join(sorted(RESERVED)) + " are taken)"
                )
            for key, reference in stage.references():
                yield from self._reference_mistakes(source, (*path, *key), reference, earlier)
            yield from self._text_mistakes(source, name, earlier)
            for key, what in stage.mistakes(data_of(self.stages, self.data, name)):
                yield f"{source.at((*path, *key))}: {what}"
            earlier.append(name)
        if self.teacher is not None and not may_be_model(self.teacher):
            yield f"{source.at(('teacher',))}: no folder {self.teacher!r} here, and a Hub id is <who>/<model>"
        for made in made_sources(self.data):
            yield (
                f"{source.at(('data', 'train'))}: the recipe's own text is there before any stage; name {made.stage} "
                "under data of the stages that read its rows"
            )
        for section, data in own_texts(self.stages, self.data).items():
            yield from (f"{source.at((*section.split('.'), what))}: {why}" for what, why in data.refusals())
        yield from self._chat_mistakes(source, self.data, ("data",))
        yield from self._augment_mistakes(source, self.data, ("data",))
        yield from self._require_mistakes(source)
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

    def _text_mistakes(self, source: Source, name: str, earlier: list[str]) -> Iterable[str]:
        """A stage's own text that does not exist or does not fit the run."""
        stage = self.stages[name]
        own, at = getattr(stage, "data", None), source.at(("stages", name, "data"))
        readers = [one for one in earlier if isinstance(self.stages[one], ReadsText) or self.stages[one].makes_data]
        if isinstance(own, str) and own not in earlier:
            yield (
                f"{at}: no earlier stage {own!r} whose text it could read"
                + (f" (there are {', '.join(readers)})" if readers else "")
                + suggest(own, readers)
            )
        elif isinstance(own, str) and self.stages[own].makes_data:
            yield from self._chat_mistakes(source, text_made_by(self.stages[own], own, self.data), ("data",))
        elif isinstance(own, str) and not isinstance(self.stages[own], ReadsText):
            yield f"{at}: {own!r} is of kind {self.stages[own].kind}, which reads no text of its own"
        elif isinstance(own, DataSpec):
            if own.tokenizer != self.data.tokenizer:
                yield f"{at}: a run has one tokenizer; remove tokenizer here, or set data.tokenizer"
            for made in made_sources(own):
                if made.stage not in earlier or not self.stages[made.stage].makes_data:
                    makers = [one for one in earlier if self.stages[one].makes_data]
                    yield f"{at}: no earlier stage {made.stage!r} that makes rows" + (
                        f" (there are {', '.join(makers)})" if makers else "; add a synthesize stage before it"
                    )
            yield from self._chat_mistakes(source, own, ("stages", name, "data"))
            yield from self._augment_mistakes(source, own, ("stages", name, "data"))
        order = data_of(self.stages, self.data, name).order
        is_trained = isinstance(stage, BudgetSpec) and stage.is_trained()
        if order is not None and order.by == "teacher_loss" and is_trained and getattr(stage, "teacher", None) is None:
            yield (
                f"{source.at(('stages', name))}: data.order by teacher_loss needs a teacher, which this stage of kind "
                f"{stage.kind} has not; give it a data section of its own, or order by length"
            )
        teacher = stage.teacher_named()
        if teacher in earlier and self.stages[teacher].makes_signal:
            ours, theirs = (data_of(self.stages, self.data, one) for one in (name, teacher))
            if differing := [key for key in WHAT_IS_SAID if getattr(ours, key) != getattr(theirs, key)]:
                yield (
                    f"{at}: {teacher!r} holds what the teacher says of another text (it differs in "
                    f"{', '.join(differing)}); set data: {teacher} here"
                )

    def _chat_mistakes(self, source: Source, data: DataSpec, path: KeyPath) -> Iterable[str]:
        """A chat template that is to come from a teacher which the recipe does not have."""
        if not data.holds_conversations:
            return
        chat = data.chat or ChatSpec()
        whose = "teacher" if chat.template == "teacher" else first_student(self.stages)
        if chat.template in ("teacher", "student") and whose == "teacher" and self.teacher is None:
            yield (
                f"{source.at((*path, 'chat', 'template'))}: there is no teacher to take it from; set "
                "template: student where a training starts from a model of your own, or name a .jinja file"
            )

    def _augment_mistakes(self, source: Source, data: DataSpec, path: KeyPath) -> Iterable[str]:
        """A model for `data.augment` that nobody has."""
        if data.augment is None:
            return
        model, at = data.augment.replace_words.model, source.at((*path, "augment", "replace_words", "model"))
        if model == "teacher":
            if self.teacher is None:
                yield f"{at}: there is no teacher to take embeddings from; name a folder or a Hub id"
        elif model in self.stages or not may_be_model(model):
            yield f"{at}: no folder or Hub id {model!r} (a text is made before any stage runs)"

    def _require_mistakes(self, source: Source) -> Iterable[str]:
        """Figures that nothing measures, and models that the run does not have."""
        measured = list(dict.fromkeys(name for stage in self.stages.values() for name in stage.measures()))
        models, earlier = list[str](), list[str]()
        for name, stage in self.stages.items():
            models += [one for one in stage.measured_models(earlier) if one not in models]
            earlier += [name] if stage.makes_model or stage.makes_file else []
        models = [one for one in models if one != "teacher" or self.teacher is not None]
        yield from self._task_mistakes(source)
        for key, expression in self.require.items():
            at = f"{source.at(('require', key))}: "
            if not measured:
                yield at + "no stage measures anything; add an evaluate stage"
                return
            model, name = split_key(key)
            if figure_name(name, measured) is None:
                more = f"; of a task also {', '.join(f'TASK.{what}' for what in OF_TASK)}"
                yield (
                    at + f"nothing measures {name!r} (measured: {', '.join(measured)}{more})" + suggest(name, measured)
                )
            if model in self.stages and not self.stages[model].makes_model and self._asked_by(name) == "lm_eval":
                yield at + f"{model} is an export, and lm-evaluation-harness asks models in transformers only"
            of = parsed(expression).of
            if of is not None and name.endswith(".recovery"):
                yield at + "recovery is of the teacher already; write the number alone, such as '>= 0.9'"
            for one in (model, of):
                if one is not None and one not in models:
                    yield (
                        at
                        + f"no model {one!r} is measured in this recipe (measured are {', '.join(models)})"
                        + suggest(one, models)
                    )

    def _asked_by(self, name: str) -> str | None:
        """Kind of the task whose figure this is; None for any other figure."""
        tasks = {key: spec for stage in self.stages.values() for key, spec in stage.asks().items()}
        found = figure_name(name, list(tasks))
        return None if found is None else tasks[found].kind

    def _task_mistakes(self, source: Source) -> Iterable[str]:
        """Two different tasks with one name: their scores would be compared as if the questions were the same."""
        first: dict[str, tuple[str, TaskSpec]] = {}
        for name, stage in self.stages.items():
            for task, spec in stage.asks().items():
                other, known = first.setdefault(task, (name, spec))
                if known != spec:
                    yield (
                        f"{source.at(('stages', name, 'tasks', task))}: stage {other} asks other questions by "
                        "this name; call one of the two otherwise"
                    )

    def _is_read_as_file(self, reference: str, path: KeyPath) -> bool:
        """Whether a key names the file that a stage makes, such as ``models`` of evaluate an export."""
        return self.stages[reference].makes_file and self.stages[str(path[1])].reads_files and "models" in path[2:]

    def _reference_mistakes(self, source: Source, path: KeyPath, reference: str, earlier: list[str]) -> Iterable[str]:
        at = f"{source.at(path)}: "
        if reference == "teacher":
            if self.teacher is None:
                yield at + "the recipe names no teacher; add teacher: <Hub id or folder>"
        elif reference in self.stages:
            if reference == path[1]:
                yield at + f"a stage cannot read what it makes itself; name an earlier stage, or {path[-1]}: teacher"
            elif reference not in earlier:
                yield at + f"{reference!r} must stand before this stage; move it up"
            elif self.stages[reference].makes_signal and path[-1] == "teacher":
                if (why := self.stages[reference].refuses(reference, self.stages[str(path[1])])) is not None:
                    yield at + why
            elif not self.stages[reference].makes_model and not self._is_read_as_file(reference, path):
                yield at + f"{reference!r} is of kind {self.stages[reference].kind}, which makes no model"
        elif not may_be_model(reference):
            models = ["teacher", *(name for name in earlier if self.stages[name].makes_model)]
            yield (
                at
                + f"no earlier stage, folder or Hub id {reference!r} (models here: {', '.join(models)})"
                + suggest(reference, models)
            )


def _made_forms(stages: dict[str, Any]) -> dict[str, str]:
    """Name of each stage that makes rows -> what they are, from the recipe as it was written."""
    known = {name: stage for name, stage in stages.items() if isinstance(stage, dict)}
    kinds = {name: str(stage.get("kind")) for name, stage in known.items()}
    found = {name: STAGES[kind] for name, kind in kinds.items() if kind in STAGES}
    specs = {name: spec for name, spec in found.items() if issubclass(spec, StageSpec) and spec.makes_data}
    return {name: spec.form_as_written(known[name]) for name, spec in specs.items()}


def _padded(data: Any) -> Any:
    """A section of data as it was written, with padded rows where it does not say how they are made."""
    return {"packing": "padded", **data} if isinstance(data, dict) else data


def may_be_model(reference: str) -> bool:
    """Whether it can be looked for: a folder, a path, a Hub id or a builtin."""
    return "/" in reference or ":" in reference or is_folder(reference)
