"""What a run costs in arithmetic and in bytes on disk, by the configs that are known before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.forecast.machine import Speed, cpu_speed, duration, free_bytes, gpu_speed
from distill.forecast.memory import MemoryModel
from distill.forecast.memory_limit import HALF, MemoryLimit, amount
from distill.forecast.text import TextForecast
from distill.models.configs import count, largest
from distill.models.layouts import layout_of
from distill.pruning.layout import Config
from distill.stages.forecast import Forecast, Signal, Training
from distill.training.spec import ComputeSpec

RUNS = Path("runs")
"""Where run folders go unless ``--run-dir`` says otherwise."""


@dataclass(frozen=True)
class StageCost:
    """Of one stage.

    Attributes:
        flops: of its training; 0 without one, None when a model of it is not known.
        model_bytes: of the model that it leaves on disk, in the precision of the model that it comes from.
        checkpoint_bytes: of all checkpoints of its training that are on disk at one time; they go when it is done.
        cache_bytes: of what its teacher says, where that is written down.
        other_bytes: of what else it leaves on disk.
    """

    flops: float | None = 0.0
    model_bytes: float = 0.0
    checkpoint_bytes: float = 0.0
    cache_bytes: float = 0.0
    other_bytes: float = 0.0

    @property
    def kept_bytes(self) -> float:
        """What stays on disk."""
        return self.model_bytes + self.cache_bytes + self.other_bytes


def training_flops(
    student: Config,
    teacher: Config | None,
    training: Training,
    length: int,
    checkpointing: bool,
    tokens: float | None = None,
) -> float:
    """Floating-point operations of a training (arXiv 2001.08361, appendix of table 1, with causal attention).

    A forward pass takes 2 per weight of a matrix and token, and ``2 x layers x heads x head size x length`` per token
    for attention; the backward pass takes twice that, or once where the weights are frozen under adapters.

    Args:
        student: config of the model that is trained.
        teacher: of the model that is asked at each step, or None.
        training: its budget.
        length: tokens of a sequence.
        checkpointing: whether activations are computed twice.
        tokens: that it reads; None: by its budget in tokens or steps.
    """
    if tokens is None:
        tokens = training.budget.steps(length) * training.budget.batch_size * length
    backward = 1.0 if training.lora is not None else 2.0
    own = (1.0 + backward + checkpointing) * _forward(student, length)
    return tokens * (own + (0.0 if teacher is None else _forward(teacher, length)))


def _forward(config: Config, length: int) -> float:
    """Operations per token of a forward pass."""
    sizes = layout_of(config).sizes(config)
    inner = sizes["attention_heads"] * sizes["head_dim"]
    lookups = 0 if config.get("tie_word_embeddings") else sizes["vocabulary"] * sizes["hidden_channels"]
    return 2.0 * ((count(config) or 0) - lookups) + 2.0 * sizes["layers"] * inner * length


def cost_of(
    forecast: Forecast, model: MemoryModel | None, compute: ComputeSpec, length: int, text: TextForecast
) -> StageCost:
    """Of a stage.

    Args:
        forecast: of the stage.
        model: of its training; None when it does not train, or a model of it is not known.
        compute: of the run.
        length: tokens of a sequence.
        text: how much there is.
    """
    made = largest(forecast.makes)
    model_bytes = (count(made) or 0) * (2.0 if _dtype(made) in HALF else 4.0) if made is not None else 0.0
    training, flops, checkpoints = forecast.training, 0.0, 0.0
    if training is not None and model is not None:
        checkpoints = (compute.keep_checkpoints + 1.0) * model.checkpoint_bytes()
        if not training.is_trial:
            flops = training_flops(
                model.student,
                None if model.is_cached else model.teacher,
                training,
                model.sequence_length,
                model.checkpointing,
                tokens_read(training, length, text) or 0.0,
            )
    trains = training is not None and not training.is_trial and training.budget.steps(length) > 0
    unknown = trains and (model is None or model.lacks_teacher)
    unknown |= trains and training is not None and tokens_read(training, length, text) is None
    cache = _cache_bytes(forecast.signal, text)
    return StageCost(None if unknown else flops, model_bytes, checkpoints, cache, forecast.disk_bytes)


def tokens_read(training: Training, length: int, text: TextForecast) -> float | None:
    """Tokens that a training reads, where rows are full; None of a budget in epochs of a text of unknown size."""
    budget = training.budget
    if budget.num_epochs is not None:
        return None if text.train is None else budget.num_epochs * text.train
    return budget.steps(length) * budget.batch_size * length


def _cache_bytes(signal: Signal | None, text: TextForecast) -> float:
    if signal is None or signal.bytes_per_token is None:
        return 0.0
    known = [number for number in (text.train, signal.max_tokens) if number is not None]
    return signal.bytes_per_token * min(known, default=0.0)


def _dtype(config: Config | None) -> str:
    return str((config or {}).get("dtype") or (config or {}).get("torch_dtype"))


def time_words(flops: float, processes: int, speed: Speed) -> str:
    """How long so many operations take."""
    least = "at least " if speed.is_bound else "about "
    return f"{least}{duration(flops / speed.flops / processes)}"


def speed_of(limit: MemoryLimit, is_here: bool) -> Speed | None:
    """Of a process of the run; None when it is for another machine, or for a GPU that is not known."""
    if not is_here:
        return None
    return gpu_speed() if limit.on_gpu else cpu_speed()


def closing_lines(
    costs: Sequence[StageCost], speed: Speed | None, processes: int, texts: Sequence[TextForecast]
) -> Iterator[str]:
    """Time and disk of the whole run.

    Args:
        costs: of all stages.
        speed: of a process; None when it is not known.
        processes: that share the work, each at that speed.
        texts: every text of the recipe.
    """
    flops = sum(cost.flops or 0.0 for cost in costs)
    if speed is not None and flops:
        partly = " that are known" if any(cost.flops is None for cost in costs) else ""
        yield f"time: {time_words(flops, processes, speed)} for the trainings{partly}, by {speed.words}"
    kept = sum(text.disk_bytes for text in texts)
    # shards are there twice while they are joined; those of a mixture's source, while the joined file is not yet
    peak = kept + max((text.disk_bytes for text in texts if not text.sources), default=0.0)
    for cost in costs:
        peak = max(peak, kept + cost.checkpoint_bytes + cost.kept_bytes)
        kept += cost.kept_bytes
    free, place = free_bytes(RUNS)
    line = f"disk: about {amount(max(peak, kept))} at its fullest, {amount(kept)} in the end"
    line += f"; {amount(free)} are free in {place}"
    yield line if peak < free else f"{line}: too little; free some, or name a folder on another disk with --run-dir"
