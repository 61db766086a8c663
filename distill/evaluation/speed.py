"""How fast a model answers and what it takes of the machine, in its engine, each model in a process of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from distill.core.errors import InputError, MachineError
from distill.evaluation.engine import TRANSFORMERS, Opening, Weights
from distill.evaluation.meter import Counters
from distill.evaluation.model_process import Child, say
from distill.evaluation.speed_child import measure
from distill.evaluation.speed_settings import SpeedSettings
from distill.evaluation.transformers_engine import name

Kernel = Literal["real", "simulated"]


@dataclass(frozen=True)
class Point:
    """Speed at one batch size and length of the prompt; as in :class:`Speed`."""

    batch: int
    prompt_tokens: int
    prefill_ms_p50: float
    prefill_ms_p90: float
    prefill_tokens_per_s: float
    peak_memory_bytes: int | None = None
    decode_tokens_per_s_p50: float | None = None
    decode_tokens_per_s_p90: float | None = None


@dataclass(frozen=True)
class Speed:
    """What was measured. With ``kernel == "simulated"`` every figure is None: it would say nothing about deployment.

    Attributes:
        kernel: "real", or "simulated" where this engine undoes the low-bit weights before it multiplies.
        prefill_ms_p50: median time of the prompt's forward pass, milliseconds; p90 is the slow end.
        prefill_tokens_per_s: prompt tokens per second at the median, over the whole batch.
        decode_tokens_per_s_p50: new tokens per second at the median step; p90: at the slow 90th percentile of steps.
            None where the engine keeps no keys and values.
        peak_memory_bytes: of the device where the model is on one, else peak resident memory of the whole process.
        memory_above_start_bytes: the same peak less what the process held before it loaded the model.
        prefill_joules_per_1000, decode_joules_per_1000: energy per 1,000 tokens by counters; None: there is none.
        cpu_load, gpu_load: percent of all processors that the process used, and of the GPUs, while it decoded.
        points: the same at each batch size and length of the prompt.
        engine: what ran the model, with version.
        dtype: type of the arithmetic, or of the weights.
        device: the device's name.
        threads: CPU threads in use.
        settings: as they were asked for.
    """

    kernel: Kernel
    engine: str
    settings: SpeedSettings
    device: str
    dtype: str | None = None
    threads: int | None = None
    prefill_ms_p50: float | None = None
    prefill_ms_p90: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s_p50: float | None = None
    decode_tokens_per_s_p90: float | None = None
    peak_memory_bytes: int | None = None
    memory_above_start_bytes: int | None = None
    prefill_joules_per_1000: float | None = None
    decode_joules_per_1000: float | None = None
    cpu_load: float | None = None
    gpu_load: float | None = None
    points: tuple[Point, ...] = ()


def measure_speed(
    folder: str | Path,
    *,
    kernel: Kernel = "real",
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = 5,
    batch: int = 1,
    device: str = "cpu",
    dtype: str = "auto",
    threads: int | None = None,
    timeout_s: float = 600.0,
    weights: Weights = "stored",
    grid: Sequence[tuple[int, int]] = (),
    module: str = TRANSFORMERS,
    kv_cache: str | None = None,
    counters: Callable[[], Counters] | None = None,
    energy_s: float = SpeedSettings.energy_s,
) -> Speed:
    """Measure one model in a process of its own; call it for one model after another.

    The prompt is random tokens: the time of a dense model does not depend on which ones.

    Args:
        folder: the model's, in the layout of its engine; or a Hub id for transformers.
        kernel: "simulated" for fake-quantized weights and for low-bit files that transformers unpacks to run; nothing
            is measured then.
        prompt_tokens: see :class:`SpeedSettings`, as for all that follow but the last five.
        new_tokens: at least 1.
        repeats: at least 1.
        batch: at least 1.
        device: torch device.
        dtype: "auto" or a torch type's name.
        threads: CPU threads or None.
        timeout_s: seconds.
        weights: "stored" or "random".
        grid: further (batch, prompt_tokens), each at least 1.
        module: of the engine; see :class:`~distill.evaluation.engine.Opening`.
        kv_cache: see there.
        counters: makes what reads the machine, in the measuring process; None: no energy is measured.
        energy_s: seconds.

    Raises:
        InputError: a setting makes no sense.
        MachineError: the model cannot be loaded or run here, with the process's own reason in one line.
    """
    lengths = (prompt_tokens, new_tokens, repeats, batch)
    settings = SpeedSettings(*lengths, device, dtype, threads, timeout_s, tuple(grid), energy_s)
    _check(settings)
    opening = Opening(str(folder), module, device, dtype, threads, kv_cache, weights)
    if kernel == "simulated":
        return Speed("simulated", name(), settings, device)
    with Child(_measure, opening, settings, counters, what=str(folder), module=module) as child:
        try:
            found = child.receive(timeout_s)
        except MachineError as error:
            raise MachineError(str(error).replace(str(folder), f"{folder}: speed cannot be measured", 1)) from None
    points = tuple(Point(**point) for point in found.pop("points"))
    return Speed("real", settings=settings, points=points, **found)


def quietest(speeds: Sequence[Speed]) -> Speed:
    """One model's rounds as one: of each time the round that was disturbed least, of memory and energy the median.

    Other work on a machine only ever makes a program slower, so the fastest round says most about the program.
    """
    points = zip(*(speed.points for speed in speeds), strict=True)
    return replace(_best(speeds), points=tuple(_best(rounds) for rounds in points))


BEST: dict[str, Callable[[list[Any]], Any]] = {
    "prefill_ms_p50": min,
    "prefill_ms_p90": min,
    "prefill_tokens_per_s": max,
    "decode_tokens_per_s_p50": max,
    "decode_tokens_per_s_p90": max,
    "peak_memory_bytes": statistics.median_low,
    "memory_above_start_bytes": statistics.median_low,
    "prefill_joules_per_1000": statistics.median_low,
    "decode_joules_per_1000": statistics.median_low,
    "cpu_load": statistics.median_low,
    "gpu_load": statistics.median_low,
}


def _best(rounds: Sequence[Any]) -> Any:
    found = {name: [v for one in rounds if (v := getattr(one, name, None)) is not None] for name in BEST}
    return replace(rounds[0], **{name: BEST[name](values) for name, values in found.items() if values})


def _check(settings: SpeedSettings) -> None:
    for key in ("prompt_tokens", "new_tokens", "repeats", "batch"):
        if getattr(settings, key) < 1:
            raise InputError(f"{key}: got {getattr(settings, key)}, expected 1 or more")
    if wrong := [point for point in settings.grid if min(point) < 1]:
        raise InputError(f"grid: got {wrong[0]}, expected 1 or more")
    if settings.dtype not in {"auto", "float32", "bfloat16", "float16"}:
        raise InputError(f"dtype: got {settings.dtype!r}, expected auto, float32, bfloat16 or float16")


def _measure(
    connection: Connection, opening: Opening, settings: SpeedSettings, counters: Callable[[], Counters] | None
) -> None:
    say(connection, measure(opening, settings, counters))
