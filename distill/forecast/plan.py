"""The plan of a recipe stage by stage, with tokens, parameters, memory and disk."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from distill.core.errors import InputError, RecipeError
from distill.data.spec import FULL
from distill.forecast.checks import fitting, missing_text
from distill.forecast.models import (
    Config,
    Known,
    candidates,
    config_of,
    configs_after,
    count,
    known_or_found,
    largest,
    size,
    source_of,
    stored_dtype,
)
from distill.forecast.room import Room, amount, job_of, lines, training_of
from distill.models.layouts import layout_for
from distill.pruning.keep import KeepSpec
from distill.pruning.layout import shape
from distill.recipe import Recipe
from distill.stages.base import StageSpec
from distill.stages.cache_teacher import CacheTeacher
from distill.stages.evaluate import Evaluate
from distill.stages.export import Export
from distill.stages.prune import Prune
from distill.training.spec import BudgetSpec, DistillSpec


def describe(recipe: Recipe, memory_gb: float | None = None) -> str:
    """The resolved recipe as a plan for people.

    Args:
        recipe: what is planned.
        memory_gb: of one GPU (or, on a CPU, for one process); None is what this machine has.

    Raises:
        RecipeError: a stage asks of a model what its config cannot give.
    """
    said = [f"{recipe.name}: {len(recipe.stages)} stages, seed {recipe.seed}"]
    known: Known = {}
    possible: dict[str, list[Config]] = {}
    unsettled: set[str] = set()  # stages whose model's size shows when they run
    mistakes, room = list(missing_text(recipe)), Room.of(recipe.compute, memory_gb)
    if recipe.teacher is not None:
        try:
            known["teacher"] = config_of(recipe.teacher)
        except InputError as error:
            known["teacher"] = None
            mistakes.append(f"{recipe.name}: teacher: {error}")
        possible["teacher"] = [config for config in [known["teacher"]] if config is not None]
        said.append(f"  teacher {recipe.teacher}: {size(known['teacher'])}")
    said.append(
        f"  data {recipe.data.train.kind}, blocks of {recipe.data.sequence_length} tokens ({recipe.data.packing}), "
        + (
            f"validation from {recipe.data.validation.kind}"
            if recipe.data.validation
            else f"{recipe.data.held_out:.0%} held out"
        )
        + f", at most {recipe.data.validation_tokens:,} tokens of it to validate on"
    )
    for number, (name, stage) in enumerate(recipe.stages.items(), 1):
        try:
            possible[name] = made = configs_after(stage, possible, recipe.data.sequence_length)
            known[name] = largest(made)  # what later stages are held against even where this one is refused
            possible[name], refused = fitting(name, stage, recipe, known, made)
            known[name] = largest(possible[name])
            if len(made) > 1 or _is_open(stage) or source_of(stage) in unsettled:
                unsettled.add(name)
            said.append(f"  [{number}/{len(recipe.stages)}] " + _line(name, stage, recipe, known, name in unsettled))
            if refused:
                said.append(f"      ends here for {len(refused)} of the {len(made)} models that may come: {refused[0]}")
            if (job := job_of(name, stage, recipe, known, room)) is not None and (budget := training_of(stage)):
                of = "of a short training: " if job.alone else ""
                said += [f"      {of}{line}" for line in lines(job, budget.batch_size, recipe.compute, room)]
        except InputError as error:
            mistakes.append(f"{recipe.name}: stages.{name}: {error}")
            known.setdefault(name, None)
            possible.setdefault(name, [])
    if mistakes:
        raise RecipeError(mistakes)
    compute = recipe.compute
    together = f"{compute.known_processes()} processes ({compute.strategy}), " * (compute.known_processes() > 1)
    said.append(
        f"  compute: {together}accelerator {compute.accelerator}, precision {compute.precision}; "
        f"W&B: {recipe.logging.wandb}"
    )
    missing = ((name, stage.missing()) for name, stage in recipe.stages.items())
    said += [f"  before this runs here: stages.{name}: {what}" for name, what in missing if what is not None]
    return "\n".join(said)


def _line(name: str, stage: StageSpec, recipe: Recipe, known: Known, is_unsettled: bool) -> str:
    title = name if stage.kind == name else f"{name} ({stage.kind})"
    parts = [f"{title}:"] if stage.kind != "report" else [f"{title}: reads what was measured;"]
    read = [reference for _, reference in stage.references()]
    if isinstance(stage, Evaluate) and not stage.models:
        parts.append("measures every model before it;")
    elif read:
        parts.append("reads " + ", ".join(dict.fromkeys(read)) + ";")
    if isinstance(stage, Prune):
        parts.append(f"keeps {_kept(stage.keep)};" if stage.keep else f"{_searched(stage, recipe, known)};")
    if isinstance(stage, Export):
        unverified = stage.target.missing_engine()
        parts.append(stage.target.kind + (f", {unverified}" if unverified and not stage.missing() else ""))
    if isinstance(stage, CacheTeacher):
        parts.append(_cached(name, stage, recipe))
    if isinstance(stage, BudgetSpec):
        parts.append(_budget(stage, recipe))
    if isinstance(stage, DistillSpec) and stage.steps(recipe.data.sequence_length):
        parts.append(_learns(stage))
    if stage.makes_model:
        parts.append(f"makes {'at most ' if is_unsettled else ''}{size(known[name])}")
    if isinstance(stage, Prune) and (memory := _cut_memory(stage, known[name], known)):
        parts.append(f"({memory})")
    return " ".join(parts).rstrip(";")


def _is_open(stage: StageSpec) -> bool:
    """Whether the size of what a stage makes shows when it runs."""
    return isinstance(stage, Prune) and (stage.keep is None or stage.keep.vocabulary == "used")


def _kept(keep: KeepSpec) -> str:
    sizes = keep.model_dump(exclude_none=True, exclude_defaults=True)
    return ", ".join(f"{key} {value}" for key, value in sizes.items()) or "everything"


def _searched(stage: Prune, recipe: Recipe, known: Known) -> str:
    """The space of a search, how many candidates there are, and what becomes of them."""
    search = stage.search
    assert search is not None
    asked = f"{search.budget.measure} at most {getattr(search.budget, search.budget.measure)}"
    if (config := known_or_found(stage.model, known)) is None:
        return f"searches {', '.join(search.axes)} for {asked} (the model's config is not on this machine)"
    space = search.space(layout_for(str(config.get("model_type"))), config)
    grid = ", ".join(f"{key} {_range(sizes)}" for key, sizes in space.grid.items())
    if search.budget.is_time:
        return f"searches {grid} for {asked}, measured on this machine"
    num = len(candidates(stage, config, recipe.data.sequence_length))
    rounds = [f"measures {min(num, search.num_measured)} of them"]
    if search.train is not None:
        rounds.append(f"trains {min(num, search.train.num_candidates)} on {_budget(search.train, recipe)}".rstrip(";"))
    return f"searches {grid}; {num:,} candidates with {asked}; {', '.join(rounds)}"


def _range(sizes: Sequence[int]) -> str:
    return f"{sizes[0]} to {sizes[-1]} ({len(sizes)} sizes)" if len(sizes) > 1 else f"{sizes[0]} alone"


def _cached(name: str, stage: CacheTeacher, recipe: Recipe) -> str:
    """What is written down, and for whom it may not be enough (the text may hold fewer sequences than are taken)."""
    length, kept = recipe.data.sequence_length, stage.num_sequences
    if kept is None:
        return f"{stage.codec.kind} of all sequences that later stages take;"
    taken: dict[str, int] = {}
    for user, other in recipe.stages.items():
        if isinstance(other, DistillSpec) and getattr(other, "teacher", "") == name:
            taken[user] = other.steps(length) * other.batch_size
    few = ", ".join(f"{user} takes {count:,}" for user, count in taken.items() if count > kept)
    warning = f" - too few if the text has more: {few}; raise num_sequences or leave it unset" if few else ""
    return f"{stage.codec.kind} of {kept:,} sequences{warning};"


def _learns(stage: DistillSpec) -> str:
    losses = " + ".join(loss.kind for loss in stage.losses)
    if stage.on_policy is None:
        return f"{losses};"
    share = stage.on_policy.share
    return f"{losses}, " + (f"{share:.0%} of steps" if isinstance(share, float) else "a share of steps") + " on-policy;"


def _budget(stage: BudgetSpec, recipe: Recipe) -> str:
    length = recipe.data.sequence_length
    steps = stage.steps(length)
    if steps == 0:
        return "no training;"
    tokens = steps * stage.batch_size * length
    if recipe.data.packing not in FULL:  # how full rows are is known when the text is read
        if stage.num_tokens is None:
            return f"at most {tokens:,} tokens = {steps:,} steps of {stage.batch_size} x {length};"
        return f"{stage.num_tokens:,} tokens = at least {steps:,} steps of {stage.batch_size} x {length};"
    return f"{tokens:,} tokens = {steps:,} steps of {stage.batch_size} x {length};"


def _cut_memory(stage: Prune, after: Config | None, known: Known) -> str | None:
    """Bytes while the weights are cut: the student, and the largest weight of the model as stored and as cut; or, where
    projections are solved anew, the student in float32 beside the whole model."""
    before = known_or_found(stage.model, known)
    student = count(after)
    if before is None or student is None or count(before) is None:
        return None
    if stage.reconstruct is not None:
        return f"{amount(4 * (student + (count(before) or 0)))} to cut and reconstruct on a CPU, after scoring"
    layout = layout_for(str(before["model_type"]))
    sizes = layout.sizes(before)
    largest = max(prod(shape(parameter, sizes)) for parameter in layout.parameters if parameter.exists(before))
    size = 2 if stored_dtype(stage, before) in ("bfloat16", "float16") else 4
    return f"{amount((student + 2 * largest) * size)} to cut, after scoring"
