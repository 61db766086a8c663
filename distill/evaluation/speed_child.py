"""What runs inside the measuring process of ``speed.py``; imported once, by the server that it is forked from."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy
import torch
import transformers  # noqa: F401  # so that the server has it loaded

from distill.evaluation import transformers_engine  # noqa: F401  # as above
from distill.evaluation.meter import Counters, Meter

if TYPE_CHECKING:
    from distill.evaluation.engine import Engine, Opening
    from distill.evaluation.speed_settings import SpeedSettings


def measure(
    opening: Opening, settings: SpeedSettings, counters: Callable[[], Counters] | None = None
) -> dict[str, Any]:
    """The figures of :class:`distill.evaluation.speed.Speed`, measured in this process."""
    if opening.threads is not None:
        torch.set_num_threads(opening.threads)
    reader = None if counters is None else counters()
    start, device_start = _resident_bytes(), _device_bytes(reader)
    engine = opening.open()
    points = []
    main: dict[str, Any] = {}
    for batch, prompt_tokens in settings.points():
        found = _point(engine, settings, batch, prompt_tokens)
        peak, above = _memory(engine, opening, reader, start, device_start)
        found["peak_memory_bytes"] = peak
        points.append({"batch": batch, "prompt_tokens": prompt_tokens, **found})
        if (batch, prompt_tokens) == (settings.batch, settings.prompt_tokens):
            main = {**found, "memory_above_start_bytes": above, **_taken(engine, settings, reader)}
    return {
        **main,
        "engine": engine.name,
        "device": engine.device,
        "dtype": engine.dtype,
        "threads": engine.threads,
        "points": points,
    }


def _point(engine: Engine, settings: SpeedSettings, batch: int, prompt_tokens: int) -> dict[str, Any]:
    prefill, steps = _times(engine, settings, batch, prompt_tokens)
    prefill_p50 = _quantile(prefill, 0.5)
    found = {
        "prefill_ms_p50": 1e3 * prefill_p50,
        "prefill_ms_p90": 1e3 * _quantile(prefill, 0.9),
        "prefill_tokens_per_s": batch * prompt_tokens / prefill_p50,
    }
    if steps:
        found["decode_tokens_per_s_p50"] = batch / _quantile(steps, 0.5)
        found["decode_tokens_per_s_p90"] = batch / _quantile(steps, 0.9)
    return found


def _times(engine: Engine, settings: SpeedSettings, batch: int, prompt_tokens: int) -> tuple[list[float], list[float]]:
    """Seconds of each prefill and of each decode step, all repeats together; the first round only warms up."""
    prompt = _prompt(engine, batch, prompt_tokens)
    engine.reserve(batch, prompt_tokens + settings.new_tokens)
    prefill: list[float] = []
    steps: list[float] = []
    for round_ in range(settings.repeats + 1):
        logits, seconds = _timed(partial(engine.prefill, prompt))
        times = [seconds]
        for _step in range(settings.new_tokens if engine.decodes else 0):
            logits, seconds = _timed(partial(engine.step, logits.argmax(-1)))
            times.append(seconds)
        if round_:
            prefill.append(times[0])
            steps.extend(times[1:])
    return prefill, steps


def _taken(engine: Engine, settings: SpeedSettings, reader: Counters | None) -> dict[str, Any]:
    """Energy and load of the main point. Without a counter of energy one answer is enough for the load."""
    batch, new_tokens = settings.batch, settings.new_tokens
    prompt = _prompt(engine, batch, settings.prompt_tokens)
    engine.reserve(batch, settings.prompt_tokens + new_tokens)
    seconds = settings.energy_s if reader is not None and reader.joules() else 0.0
    on_gpu = engine.device != "cpu"
    prefill, decode = Meter(reader, on_gpu), Meter(reader, on_gpu)

    def read() -> numpy.ndarray:
        with prefill.over(prompt.size):
            return engine.prefill(prompt)

    def answer() -> None:
        logits = read()
        with decode.over(batch * new_tokens):
            for _step in range(new_tokens):
                logits = engine.step(logits.argmax(-1))

    if engine.decodes:
        answer()
        decode.lasts(answer, seconds)
    prefill.lasts(read, max(seconds, 1e-9))
    whole = decode if engine.decodes else prefill
    return {
        "prefill_joules_per_1000": prefill.joules_per_1000_tokens(),
        "decode_joules_per_1000": decode.joules_per_1000_tokens(),
        "cpu_load": whole.cpu_load(),
        "gpu_load": whole.gpu_load() if not engine.device.startswith("cpu") else None,
    }


def _prompt(engine: Engine, batch: int, prompt_tokens: int) -> numpy.ndarray:
    generator = numpy.random.Generator(numpy.random.PCG64(0))
    return generator.integers(engine.vocabulary, size=(batch, prompt_tokens), dtype=numpy.int64)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """A call's result and its wall-clock seconds."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _memory(
    engine: Engine, opening: Opening, reader: Counters | None, start: int, device_start: int | None
) -> tuple[int | None, int | None]:
    """Bytes: (most held so far, of which above the start); of the device where the engine runs on one, None where
    nothing reads that."""
    known = engine.device_memory()
    if known is not None:
        return known, known
    if opening.device != "cpu" and engine.device != "cpu":
        now = _device_bytes(reader)
        if now is None or device_start is None:
            return None, None
        return max(0, now - device_start), max(0, now - device_start)
    peak = _resident_bytes()
    return peak, max(0, peak - start)


def _device_bytes(reader: Counters | None) -> int | None:
    """Bytes in use on the GPUs, by whomever."""
    used = [gpu["memory"] for gpu in reader.gpus() if "memory" in gpu] if reader is not None else []
    return sum(used) if used else None


def _resident_bytes() -> int:
    """The process's peak resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes


def _quantile(values: list[float], share: float) -> float:
    return float(numpy.quantile(values, share))
