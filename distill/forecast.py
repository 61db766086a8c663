"""What a recipe will do, before it does anything: the plan stage by stage, with tokens, parameters and memory.

Reads configs that are on this machine already; a model that is not is named as unknown, never downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from distill.core.errors import InputError, RecipeError
from distill.data.hub import Hub
from distill.data.spec import FULL
from distill.losses import StateLossSpec
from distill.models.layouts import LAYOUTS, layout_for
from distill.models.load import locate
from distill.models.states import Shapes, pairs_of
from distill.pruning.keep import KeepSpec
from distill.pruning.layout import shape
from distill.pruning.search import Candidate
from distill.pruning.select import target_sizes
from distill.recipe import Recipe
from distill.stages.base import StageSpec
from distill.stages.cache_teacher import CacheTeacher
from distill.stages.distill import Distill
from distill.stages.evaluate import Evaluate
from distill.stages.export import Export
from distill.stages.finetune import Finetune, NewModel
from distill.stages.prune import Prune
from distill.stages.quantize import Quantize
from distill.stages.sparsify import Sparsify
from distill.training.ends import agreed_ends
from distill.training.spec import BudgetSpec, ComputeSpec, DistillSpec, split_batch

TRAINED_BYTES = 16
"""Bytes a trained parameter: fp32 weight, gradient and AdamW's two moments."""
FROZEN_BYTES = 4
"""Bytes a frozen parameter at most (fp32, as on a CPU; half of it in bf16 on a GPU)."""

SOURCES: dict[type[StageSpec], str] = {
    Prune: "model",
    Sparsify: "model",
    Finetune: "model",
    Distill: "student",
    Quantize: "student",
}
"""Stage that makes a model of another -> key of that other."""
Config = dict[str, Any]


def describe(recipe: Recipe) -> str:
    """The resolved recipe as a plan for people.

    Raises:
        RecipeError: a stage asks of a model what its config cannot give.
    """
    lines = [f"{recipe.name}: {len(recipe.stages)} stages, seed {recipe.seed}"]
    known: dict[str, Config | None] = {}
    mistakes = list(_missing_text(recipe))
    if recipe.teacher is not None:
        try:
            known["teacher"] = _config(recipe.teacher)
        except InputError as error:
            known["teacher"] = None
            mistakes.append(f"{recipe.name}: teacher: {error}")
        lines.append(f"  teacher {recipe.teacher}: {_size(known['teacher'])}")
    lines.append(
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
            known[name] = _after(stage, known, recipe.data.sequence_length)
            _check(stage, recipe, known[name])
            _check_states(stage, known)
            _check_ends(stage, known)
            lines.append(f"  [{number}/{len(recipe.stages)}] " + _line(name, stage, recipe, known))
        except InputError as error:
            mistakes.append(f"{recipe.name}: stages.{name}: {error}")
            known.setdefault(name, None)
    if mistakes:
        raise RecipeError(mistakes)
    compute = recipe.compute
    together = f"{compute.known_processes()} processes ({compute.strategy}), " * (compute.known_processes() > 1)
    lines.append(
        f"  compute {together}{compute.accelerator}, precision {compute.precision}, {recipe.logging.wandb} W&B"
    )
    return "\n".join(lines)


def _missing_text(recipe: Recipe) -> Iterator[str]:
    """A line for each source whose files are not there; what lives on the Hub is not looked for."""
    for key, source in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        try:
            if source is not None and not isinstance(source, Hub):
                source.num_bytes()
        except InputError as error:
            yield f"{recipe.name}: data.{key}: {error}"


def _check(stage: StageSpec, recipe: Recipe, config: Config | None) -> None:
    """What would else be found hours into the run.

    Raises:
        InputError: a batch that does not split, sequences longer than the positions, a grid that does not fit.
    """
    length = recipe.data.sequence_length
    if isinstance(stage, BudgetSpec) and stage.steps(length):
        split_batch(stage, recipe.compute, recipe.compute.known_processes())
        positions = (config or {}).get("max_position_embeddings")
        if positions is not None and length > positions:
            raise InputError(
                f"data.sequence_length ({length}) is longer than the model's {positions} positions; lower it"
            )
    layout = LAYOUTS.get(str((config or {}).get("model_type")))
    if isinstance(stage, Quantize) and config is not None and layout is not None and _count(config) is not None:
        sizes = layout.sizes(config)
        for parameter in layout.parameters:
            name = parameter.path.removesuffix(".weight")
            holder = name.rpartition(".")[0]
            if len(parameter.axes) == 3 and not stage.quantizer.skips(holder):
                raise InputError(
                    f"{holder} holds the experts' weights as one tensor, which cannot be quantized; add "
                    f"{holder.rpartition('.')[2]!r} to skip to ship them as they are"
                )
            if len(parameter.axes) == 2 and "{layer}" in name and not stage.quantizer.skips(name):
                grid = stage.grid_of(name)
                grid.groups(shape(parameter, sizes)[1])
                if stage.rounding == "gptq" and not grid.keeps_scale:
                    raise InputError(
                        f"{name}: rounding: gptq rounds to symmetric integer grids, not {grid.label()}; set nearest"
                    )


def _check_states(stage: StageSpec, known: dict[str, Config | None]) -> None:
    """Hold losses on inner states against the shapes of both models, where they are known.

    Raises:
        InputError: a layer that is not there, or heads that do not divide.
    """
    losses = [loss for loss in getattr(stage, "losses", []) if isinstance(loss, StateLossSpec)]
    if not losses or not isinstance(stage, Distill | Quantize):
        return
    configs = [known[name] if name in known else _config(name) for name in (stage.student, stage.teacher)]
    student, teacher = (Shapes.of(c) if c is not None and _count(c) is not None else None for c in configs)
    if student is not None and teacher is not None:
        for loss in losses:
            pairs_of(loss, student, teacher)


def _check_ends(stage: StageSpec, known: dict[str, Config | None]) -> None:
    """Whether student and teacher end a text alike, as far as their configs are known and the stage asks for it.

    Raises:
        InputError: they do not.
    """
    if isinstance(stage, DistillSpec) and stage.on_policy is not None:
        ends = [(_known(reference, known) or {}).get("eos_token_id") for _, reference in stage.references()]
        if len(ends) == 2 and None not in ends:
            agreed_ends(*ends)


def _line(name: str, stage: StageSpec, recipe: Recipe, known: dict[str, Config | None]) -> str:
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
        parts.append(stage.missing() or stage.target.kind + (f", {unverified}" if unverified else ""))
    if isinstance(stage, CacheTeacher):
        parts.append(_cached(name, stage, recipe))
    if isinstance(stage, BudgetSpec):
        parts.append(_budget(stage, recipe))
    if isinstance(stage, DistillSpec) and stage.steps(recipe.data.sequence_length):
        parts.append(_learns(stage))
    if stage.makes_model:
        parts.append(f"makes {'at most ' if _is_open(stage) else ''}{_size(known[name])}")
    if (
        isinstance(stage, BudgetSpec)
        and stage.steps(recipe.data.sequence_length)
        and (memory := _memory(name, stage, known, recipe.compute))
    ):
        parts.append(f"({memory})")
    if isinstance(stage, Prune) and (memory := _cut_memory(stage, known[name], known)):
        parts.append(f"({memory})")
    return " ".join(parts).rstrip(";")


def _is_open(stage: StageSpec) -> bool:
    """Whether the size of what a stage makes shows when it runs."""
    return isinstance(stage, Prune) and (stage.keep is None or stage.keep.vocabulary == "used")


def _kept(keep: KeepSpec) -> str:
    sizes = keep.model_dump(exclude_none=True, exclude_defaults=True)
    return ", ".join(f"{key} {value}" for key, value in sizes.items()) or "everything"


def _searched(stage: Prune, recipe: Recipe, known: dict[str, Config | None]) -> str:
    """The space of a search, how many candidates there are, and what becomes of them."""
    search = stage.search
    assert search is not None
    asked = f"{search.budget.measure} at most {getattr(search.budget, search.budget.measure)}"
    if (config := _known(stage.model, known)) is None:
        return f"searches {', '.join(search.axes)} for {asked} (the model's config is not on this machine)"
    space = search.space(layout_for(str(config.get("model_type"))), config)
    grid = ", ".join(f"{key} {_range(sizes)}" for key, sizes in space.grid.items())
    if search.budget.is_time:
        return f"searches {grid} for {asked}, measured on this machine"
    num = len(_candidates(stage, config, recipe.data.sequence_length))
    rounds = [f"measures {min(num, search.num_measured)} of them"]
    if search.train is not None:
        rounds.append(f"trains {min(num, search.train.num_candidates)} on {_budget(search.train, recipe)}".rstrip(";"))
    return f"searches {grid}; {num:,} candidates with {asked}; {', '.join(rounds)}"


def _range(sizes: Sequence[int]) -> str:
    return f"{sizes[0]} to {sizes[-1]} ({len(sizes)} sizes)" if len(sizes) > 1 else f"{sizes[0]} alone"


def _candidates(stage: Prune, config: Config, sequence_length: int) -> list[Candidate]:
    assert stage.search is not None
    layout = layout_for(str(config.get("model_type")))
    costs = stage.search.costs(layout, config, sequence_length=sequence_length, dtype=_stored(stage, config))
    return stage.search.candidates(stage.search.space(layout, config), costs)


def _stored(stage: Prune, config: Config) -> str:
    """Precision in which a cut model is stored."""
    return str(config.get("dtype") or config.get("torch_dtype")) if stage.save_dtype == "auto" else stage.save_dtype


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


def _config(reference: str) -> Config | None:
    """A model's config, if it is on this machine."""
    location = locate(reference)
    file: Path | None = Path(location) / "config.json"
    if file is None or not file.is_file():
        if Path(location).is_dir():
            return None
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(location, "config.json")
        except ValueError as error:
            raise InputError(f"{location}: neither a folder nor a Hub id ({' '.join(str(error).split())})") from None
        file = Path(cached) if isinstance(cached, str) else None
    if file is None:
        return None
    config = json.loads(file.read_text())
    generation = file.with_name("generation_config.json")
    if generation.is_file():  # it has the last word on what ends a text
        config["eos_token_id"] = json.loads(generation.read_text()).get("eos_token_id", config.get("eos_token_id"))
    return config


def _known(reference: str, known: dict[str, Config | None]) -> Config | None:
    return known[reference] if reference in known else _config(reference)


def _after(stage: StageSpec, known: dict[str, Config | None], sequence_length: int) -> Config | None:
    """The config of the model that a stage makes, as far as it can be known; of a search the largest that it may be."""
    if isinstance(stage, Finetune) and isinstance(stage.model, NewModel):
        return dict(stage.model.config)
    source = SOURCES.get(type(stage))
    if source is None:
        return None
    reference = getattr(stage, source)
    config = _known(reference, known)
    if config is None or not isinstance(stage, Prune):
        return config
    layout = layout_for(str(config.get("model_type")))
    if stage.keep is not None:
        after = target_sizes(stage.keep, config, layout)
        if isinstance(stage.keep.vocabulary, int):
            after["vocabulary"] = stage.keep.vocabulary
        return config | layout.resized(config, after)
    if stage.search is not None and stage.search.budget.is_time:
        return config  # how large a model of some speed is shows when it is measured
    found = [config | layout.resized(config, c.sizes) for c in _candidates(stage, config, sequence_length)]
    return max(found, key=lambda one: _count(one) or 0)


def _count(config: Config | None) -> int | None:
    layout = LAYOUTS.get(str(config.get("model_type"))) if config else None
    if layout is None or config is None or "vocab_size" not in config:
        return None
    return layout.count(config)


def _size(config: Config | None) -> str:
    count = _count(config)
    return (
        "a model of unknown size (its config is not on this machine)"
        if count is None
        else f"{_short(count)} parameters"
    )


def _memory(name: str, stage: StageSpec, known: dict[str, Config | None], compute: ComputeSpec) -> str | None:
    """Bytes of weights, gradients and optimizer in a process; activations come on top."""
    student = _count(known[name])
    if student is None:
        return None
    trained = TRAINED_BYTES if getattr(stage, "lora", None) is None else FROZEN_BYTES
    total = student * trained
    for key, reference in stage.references():
        if key == ("teacher",):
            total += (_count(_known(reference, known)) or 0) * FROZEN_BYTES
    num_processes = compute.known_processes()
    if compute.strategy == "fsdp":
        total //= num_processes
    each = " in each process" if num_processes > 1 else ""
    return f"{total / 1e9:,.2f} GB{each} for weights, gradients and optimizer; activations come on top"


def _cut_memory(stage: Prune, after: Config | None, known: dict[str, Config | None]) -> str | None:
    """Bytes while the weights are cut: the student, and the largest weight of the model as stored and as cut."""
    before = known[stage.model] if stage.model in known else _config(stage.model)
    student = _count(after)
    if before is None or student is None or _count(before) is None:
        return None
    layout = layout_for(str(before["model_type"]))
    sizes = layout.sizes(before)
    largest = max(prod(shape(parameter, sizes)) for parameter in layout.parameters if parameter.exists(before))
    size = 2 if _stored(stage, before) in ("bfloat16", "float16") else 4
    return f"{(student + 2 * largest) * size / 1e9:,.2f} GB to cut, after scoring"


def _short(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
