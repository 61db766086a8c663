"""What would else be found hours into a run: held against the configs and files that are on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from distill.core.errors import InputError
from distill.data.hub import Hub
from distill.forecast.models import Config, Known, config_of, count, known_or_found, source_of
from distill.losses import StateLossSpec
from distill.models.layouts import LAYOUTS
from distill.models.load import CLASSIFIER, Task, another_task
from distill.models.states import Shapes, pairs_of
from distill.pruning.layout import Layout, shape
from distill.quantization.base import DEFAULT_SKIP, matches
from distill.quantization.kv_cache import check_cache
from distill.recipe import Recipe
from distill.stages.base import StageSpec
from distill.stages.distill import Distill
from distill.stages.export import Export
from distill.stages.prune import Prune
from distill.stages.quantize import Quantize
from distill.training.ends import agreed_ends
from distill.training.spec import BudgetSpec, DistillSpec, split_batch

TIE = "tie_word_embeddings"


def missing_text(recipe: Recipe) -> Iterator[str]:
    """A line for each source whose files are not there; what lives on the Hub is not looked for."""
    for key, source in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        try:
            if source is not None and not isinstance(source, Hub):
                source.num_bytes()
        except InputError as error:
            yield f"{recipe.name}: data.{key}: {error}"


def fitting(
    name: str, stage: StageSpec, recipe: Recipe, known: Known, configs: list[Config]
) -> tuple[list[Config], list[InputError]]:
    """Those of the configs that a stage's model may have with which it can work, and why not with the others.

    Raises:
        InputError: it can work with none of them.
    """
    fits: list[Config] = []
    refused: list[InputError] = []
    source = None if isinstance(stage, Prune) else source_of(stage)  # else its model has the config of what it reads
    either: list[Config | None] = [*configs] or [None]
    for config in either:
        try:
            check_stage(name, stage, recipe, {**known, name: config} | ({source: config} if source in known else {}))
            fits += [config] if config is not None else []
        except InputError as error:
            refused.append(error)
    if refused and not fits:
        raise refused[0]
    return fits, refused


def check_stage(name: str, stage: StageSpec, recipe: Recipe, known: Known) -> None:
    """What would else be found hours into the run.

    Raises:
        InputError: a batch that does not split, sequences longer than the positions, a grid that does not fit, a model
            for another task than the stage's, losses that the models' inner states cannot have, student and teacher
            that end a text otherwise.
    """
    config = known[name]
    _check_sizes(stage, recipe, config)
    if isinstance(stage, Quantize) and stage.num_steps:  # of a budget in tokens, packing may make more or fewer
        stage.check_steps(stage.num_steps)
    if isinstance(stage, Quantize) and config is not None:
        _check_grids(stage, config)
    if isinstance(stage, Export):
        _check_target(stage, recipe)
    _check_task(stage, known)
    _check_states(stage, known)
    _check_ends(stage, known)


def _check_sizes(stage: StageSpec, recipe: Recipe, config: Config | None) -> None:
    length = recipe.data.sequence_length
    if isinstance(stage, BudgetSpec) and stage.steps(length):
        split_batch(stage, recipe.compute, recipe.compute.known_processes())
        positions = (config or {}).get("max_position_embeddings")
        if positions is not None and length > positions:
            raise InputError(
                f"data.sequence_length ({length}) is longer than the model's {positions} positions; lower it"
            )


def _check_grids(stage: Quantize, config: Config) -> None:
    layout = LAYOUTS.get(str(config.get("model_type")))
    if layout is None or count(config) is None:
        return
    sizes = layout.sizes(config)
    if stage.kv_cache is not None:
        check_cache(stage.kv_cache, sizes["head_dim"])
    _check_patterns(stage, layout, config)
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


def _check_patterns(stage: Quantize, layout: Layout, config: Config) -> None:
    """Whether each pattern fits some layer, and none a head or an embedding that share their weight.

    Raises:
        InputError: it does not, or it does.
    """
    matrices = [parameter for parameter in layout.parameters if len(parameter.axes) > 1]
    layers = range(layout.sizes(config)["layers"])
    names = {
        path.rpartition(".")[0].format(layer=layer)
        for path in (parameter.path for parameter in matrices)
        for layer in (layers if "{layer}" in path else layers[:1])
    }
    grid = stage.quantizer
    asked = [("skip", pattern) for pattern in grid.skip if pattern not in DEFAULT_SKIP]
    asked += [("include", pattern) for pattern in grid.include] + [("layers", one.match) for one in stage.layers]
    for key, pattern in asked:
        if not any(matches(pattern, name) for name in names):
            called = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise InputError(f"{key}: {pattern!r} fits no layer (they are called {called}); mend or remove it")
    ends = [p.path.removesuffix(".weight") for p in matrices if p.axes[0] == "vocabulary" and p.exists(config)]
    for head in (p.path.removesuffix(".weight") for p in matrices if p.unless == TIE and not p.exists(config)):
        shared = [name for name in ends if any(matches(pattern, name) for pattern in grid.include)]
        if shared or not grid.skips(head):
            what = f"remove {shared[0]} from include, and add" if shared else "add"
            raise InputError(
                f"{head} shares its weight with {ends[0]}, and no format here stores a shared weight quantized; {what} "
                f"{head!r} to skip"
            )


def _check_target(stage: Export, recipe: Recipe) -> None:
    """Hold a target against the grids of the model that a stage before it makes.

    Raises:
        InputError: the model cannot be written so.
    """
    made = recipe.stages.get(stage.model)
    if isinstance(made, Quantize):
        stage.target.check_grids(made.every_grid(), made.activations)
    elif made is not None:
        stage.target.check_grids((), None)


def _check_task(stage: StageSpec, known: Known) -> None:
    """Whether a stage is given what it can use, as far as configs are known: encoders are only exported so far.

    Raises:
        InputError: it is not.
    """
    tasks = stage.target.tasks if isinstance(stage, Export) else ("causal_lm",)
    for _, reference in stage.references():
        config = known_or_found(reference, known) or {}
        kind = str(config.get("model_type"))
        task: Task = LAYOUTS[kind].task if kind in LAYOUTS else "causal_lm"
        if any(name.endswith(CLASSIFIER) for name in config.get("architectures") or ()):
            task = "classification"
        if task not in tasks:
            raise another_task(reference, kind, task)


def _check_states(stage: StageSpec, known: Known) -> None:
    """Hold losses on inner states against the shapes of both models, where they are known.

    Raises:
        InputError: a layer that is not there, or heads that do not divide.
    """
    losses = [loss for loss in getattr(stage, "losses", []) if isinstance(loss, StateLossSpec)]
    if not losses or not isinstance(stage, Distill | Quantize):
        return
    configs = [known[name] if name in known else config_of(name) for name in (stage.student, stage.teacher)]
    student, teacher = (Shapes.of(c) if c is not None and count(c) is not None else None for c in configs)
    if student is not None and teacher is not None:
        for loss in losses:
            pairs_of(loss, student, teacher)


def _check_ends(stage: StageSpec, known: Known) -> None:
    """Whether student and teacher end a text alike, as far as their configs are known and the stage asks for it.

    Raises:
        InputError: they do not.
    """
    if isinstance(stage, DistillSpec) and stage.on_policy is not None:
        ends = [(known_or_found(reference, known) or {}).get("eos_token_id") for _, reference in stage.references()]
        if len(ends) == 2 and None not in ends:
            agreed_ends(*ends)
