"""The plan of a recipe stage by stage, with tokens, parameters, memory and disk."""

from __future__ import annotations

from collections.abc import Iterator

from distill.core.errors import InputError, RecipeError
from distill.data.hub import Hub
from distill.data.mixture import Mixture
from distill.data.remote import check_reader
from distill.data.spec import DataSpec
from distill.forecast import text as texts
from distill.forecast.chat import about_chat
from distill.forecast.costs import StageCost, closing_lines, cost_of, speed_of
from distill.forecast.look import look
from distill.forecast.memory import MemoryModel
from distill.forecast.memory_limit import MemoryLimit, amount, lines, memory_model_of
from distill.forecast.mixture import about_mixture, often_read
from distill.forecast.reading import about_reading
from distill.forecast.tokens import other_vocabularies
from distill.models.configs import config_of, count, largest, size
from distill.recipe import Recipe
from distill.stages.base import StageSpec, View
from distill.stages.forecast import Forecast, Training
from distill.stages.text import data_of, own_texts


def describe(recipe: Recipe, memory_gb: float | None = None) -> str:
    """The resolved recipe as a plan for people.

    Args:
        recipe: what is planned.
        memory_gb: of one GPU (or, on a CPU, for one process); None is what this machine has.

    Raises:
        RecipeError: a stage asks of a model what its config cannot give.
    """
    said = [f"{recipe.name}: {len(recipe.stages)} stages, seed {recipe.seed}"]
    said[0] += "" if recipe.task.is_causal else f", task: {recipe.task.kind}"
    mistakes, limit = list(missing_text(recipe)), MemoryLimit.of(recipe.compute, memory_gb)
    known: dict[str, Forecast] = {}
    if recipe.teacher is not None:
        try:
            config = config_of(recipe.teacher)
        except InputError as error:
            config = None
            mistakes.append(f"{recipe.name}: teacher: {error}")
        known["teacher"] = Forecast(makes=() if config is None else (config,))
        said.append(f"  teacher {recipe.teacher}: {size(config)}")
    said.append(_text(recipe))
    found: list[tuple[DataSpec, texts.TextForecast]] = []
    for key, section in own_texts(recipe.stages, recipe.data).items():
        one, text = recipe.model_copy(update={"data": section}), texts.TextForecast(None, None)
        if key != "data":
            said.append(f"  {key}:{_text(one).removeprefix('  data')}")
        try:
            if not mistakes:
                looks = {name: look(source, section.task, name) for name, source in section.sources()}
                text = texts.text_of(one, looks)
                num_machines = 1 if section.needs_order else recipe.compute.num_nodes
                about = (*lines_of_text(text, section, num_machines), *about_reading(one, looks), *about_chat(one))
                said += [f"    {line}" for line in about]
        except InputError as error:
            mistakes.append(f"{recipe.name}: {error}")
        found.append((section, text))
    if not mistakes:  # a model that is not there has been named
        try:
            mistakes += [f"{recipe.name}: {line}" for line in other_vocabularies(recipe)]
        except InputError as error:
            mistakes.append(f"{recipe.name}: {error}")
    costs: list[StageCost] = []
    for number, (name, stage) in enumerate(recipe.stages.items(), 1):
        try:
            view, forecast = _forecast(recipe, name, known)
            data = view.data
            of_stage = next((text for section, text in found if section == data), texts.TextForecast(None, None))
            said.append(f"  [{number}/{len(recipe.stages)}] {_line(name, stage, forecast)}")
            model = memory_model_of(forecast, view, limit)
            said += [f"      {line}" for line in _details(forecast, view, limit, model, of_stage)]
            costs.append(cost_of(forecast, model, recipe.compute, data.sequence_length, of_stage))
        except InputError as error:
            mistakes.append(f"{recipe.name}: stages.{name}: {error}")
            known.setdefault(name, Forecast())
    if mistakes:
        raise RecipeError(mistakes)
    compute = recipe.compute
    together = f"{compute.known_processes()} processes ({compute.strategy}), " * (compute.known_processes() > 1)
    said.append(
        f"  compute: {together}accelerator {compute.accelerator}, precision {compute.precision}; "
        f"W&B: {recipe.logging.wandb}"
    )
    speed = speed_of(limit, is_here=memory_gb is None)
    processes = limit.processes(compute) if limit.on_gpu else 1
    said += [f"  {line}" for line in closing_lines(costs, speed, processes, [text for _, text in found])]
    said += [f"  requires {key} {bound}, else exit code 3" for key, bound in recipe.require.items()]
    missing = ((name, stage.missing()) for name, stage in recipe.stages.items())
    said += [f"  before this runs here: stages.{name}: {what}" for name, what in missing if what is not None]
    return "\n".join(said)


def _forecast(recipe: Recipe, name: str, known: dict[str, Forecast]) -> tuple[View, Forecast]:
    """What a stage sees and says; it is added to what is known.

    Raises:
        InputError: the stage cannot do its work.
    """
    data = data_of(recipe.stages, recipe.data, name)
    view = View(name, recipe.stages, data, recipe.compute, dict(known), recipe.teacher)
    forecast = known[name] = recipe.stages[name].forecast(view)
    if forecast.is_refused:
        raise forecast.refused[0]
    return view, forecast


def trainings(recipe: Recipe, limit: MemoryLimit) -> Iterator[tuple[str, Training, MemoryModel | None, DataSpec]]:
    """(name, training, how much memory it takes, text) of each stage that trains.

    Args:
        recipe: that :func:`describe` accepts.
        limit: where its processes live.

    Raises:
        InputError: a stage cannot do its work.
    """
    known: dict[str, Forecast] = {}
    if recipe.teacher is not None:
        config = config_of(recipe.teacher)
        known["teacher"] = Forecast(makes=() if config is None else (config,))
    for name in recipe.stages:
        view, forecast = _forecast(recipe, name, known)
        training = forecast.training
        if training is not None and training.budget.steps(view.data.sequence_length):
            yield name, training, memory_model_of(forecast, view, limit), view.data


def missing_text(recipe: Recipe) -> Iterator[str]:
    """A line for each source whose files are not there; what lives on the Hub or elsewhere is not looked for."""
    for where, section in own_texts(recipe.stages, recipe.data).items():
        for key, source in (*section.sources(), *section.tests()):
            try:
                if source.is_remote():
                    check_reader(source.paths())
                elif isinstance(source, Hub):
                    source.check_place()
                else:
                    source.num_bytes()
            except InputError as error:
                yield f"{recipe.name}: {where}{key.removeprefix('data')}: {error}"


def _text(recipe: Recipe) -> str:
    data = recipe.data
    if isinstance(data.train, Mixture):
        return (
            f"  data a mixture of {len(data.train.sources)} sources, rows of {data.sequence_length} tokens "
            f"({data.packing}), at most {data.validation_tokens:,} tokens to validate on"
        )
    validation = f"validation from {data.validation.kind}" if data.validation else f"{data.held_out:.0%} held out"
    return (
        f"  data {data.train.kind}, rows of {data.sequence_length} tokens ({data.packing}), {validation}, at most "
        f"{data.validation_tokens:,} tokens of it to validate on"
    )


def _line(name: str, stage: StageSpec, forecast: Forecast) -> str:
    """What a stage reads, does and makes."""
    title = name if stage.kind == name else f"{name} ({stage.kind})"
    parts = [forecast.reads] if forecast.reads else []
    parts += forecast.does
    if stage.makes_model:
        need = f" ({amount(forecast.need.num_bytes)} {forecast.need.why})" if forecast.need is not None else ""
        made = largest(forecast.makes)
        at_most = "at most " if forecast.is_open and count(made) is not None else ""
        parts.append(f"makes {at_most}{size(made)}{need}")
    return f"{title}: {'; '.join(parts)}"


def _details(
    forecast: Forecast, view: View, limit: MemoryLimit, model: MemoryModel | None, text: texts.TextForecast
) -> Iterator[str]:
    """For which models a stage ends a run, how often it reads the text, and the memory of what it trains."""
    if forecast.refused:
        num_models = len(forecast.refused) + len(forecast.makes)
        yield f"ends here for {len(forecast.refused)} of the {num_models} models that may come: {forecast.refused[0]}"
    training = forecast.training
    if training is not None:
        if model is not None:
            of = "of a short training: " if model.is_single_process else ""
            yield from (of + line for line in lines(model, training.budget.batch_size, view.compute, limit))
        if not training.is_trial and (line := _passes(training, view, text)) is not None:
            yield line
        order = view.data.order
        if order is not None and order.by == "teacher_loss":
            part = f"the first {order.until:.0%} of its rows"
            yield f"before it starts, its teacher reads {part}, to sort them (data.order)"
        if view.data.augment is not None and (
            silent := [loss.kind for loss in training.losses if not loss.needs_teacher]
        ):
            yield (
                f"{', '.join(silent)} takes the words that data.augment puts in for what somebody has written; such "
                "copies suit losses on a teacher's output, so give this stage a text without augment"
            )
    yield from forecast.notes


def lines_of_text(text: texts.TextForecast, data: DataSpec, num_machines: int) -> Iterator[str]:
    """How much text there is, tokenized by so many machines; of a mixture source by source."""
    if isinstance(data.train, Mixture):
        yield from about_mixture(data.train, data, text)
    yield from texts.lines(text, data, num_machines)


def _passes(training: Training, view: View, text: texts.TextForecast) -> str | None:
    """How often a training reads the text, or sources of it, where that is worth a line."""
    tokens = _tokens_read(training, view)
    if tokens is None:
        return None
    if isinstance(view.data.train, Mixture):
        return often_read(view.data.train, tokens, text)
    return texts.passes(tokens, text)


def _tokens_read(training: Training, view: View) -> float | None:
    """Tokens that a training reads, where rows are full; None of a budget in epochs, which says how often it reads."""
    budget, length = training.budget, view.data.sequence_length
    if budget.num_epochs is not None:
        return None
    return budget.num_tokens if budget.num_tokens is not None else budget.steps(length) * budget.batch_size * length
