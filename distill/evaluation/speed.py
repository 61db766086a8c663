"""How fast a model answers and how much memory it takes, each model in a process of its own.

A process's peak memory never falls, so two models in one process would share the larger one's peak. The processes are
forked from a server that has torch and transformers loaded already: a start costs milliseconds instead of seconds.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from distill.core.errors import InputError, MachineError
from distill.evaluation.speed_settings import SpeedSettings, Weights

Kernel = Literal["real", "simulated"]


@dataclass(frozen=True)
class Speed:
    """What was measured. With ``kernel == "simulated"`` every figure is None: it would say nothing about deployment.

    Attributes:
        kernel: "real", or "simulated" where this engine undoes the low-bit weights before it multiplies.
        prefill_ms_p50: median time of the prompt's forward pass, milliseconds; p90 is the slow end.
        prefill_tokens_per_s: prompt tokens per second at the median, over the whole batch.
        decode_tokens_per_s_p50: new tokens per second at the median step; p90: at the slow 90th percentile of steps.
        peak_memory_bytes: CUDA: most memory allocated on the device; CPU: peak resident memory of the whole process.
        memory_above_start_bytes: the same peak less what the process held before it loaded the model.
        engine: what ran the model, with version.
        dtype: type of the arithmetic.
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
) -> Speed:
    """Measure one model folder in a process of its own; call it for one model after another.

    The prompt is random tokens: the time of a dense model does not depend on which ones.

    Args:
        folder: Hugging Face layout, or a Hub id.
        kernel: "simulated" for fake-quantized weights and for low-bit files that transformers unpacks to run; nothing
            is measured then.
        prompt_tokens: see :class:`SpeedSettings`, as for all that follow.
        new_tokens: at least 1.
        repeats: at least 1.
        batch: at least 1.
        device: torch device.
        dtype: "auto" or a torch type's name.
        threads: CPU threads or None.
        timeout_s: seconds.
        weights: "stored" or "random".

    Raises:
        InputError: a setting makes no sense.
        MachineError: the model cannot be loaded or run here, with the process's own reason in one line.
    """
    settings = SpeedSettings(prompt_tokens, new_tokens, repeats, batch, device, dtype, threads, timeout_s, weights)
    _check(settings)
    if kernel == "simulated":
        return Speed("simulated", _engine(), settings, device)
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, str(folder), asdict(settings)), daemon=True)
    with _without_main():
        process.start()
    sender.close()
    state: str
    result: Any
    try:
        state, result = receiver.recv() if receiver.poll(timeout_s) else ("error", f"no answer in {timeout_s:g} s")
    except EOFError:
        process.join(10)
        state, result = "error", _death(process.exitcode)
    finally:
        receiver.close()
        process.join(1)
        if process.is_alive():
            process.kill()
            process.join()
    if state == "error":
        raise MachineError(f"{folder}: speed cannot be measured: {result}")
    return Speed("real", _engine(), settings, **result)


def quietest(speeds: Sequence[Speed]) -> Speed:
    """One model's rounds as one: of each time the round that was disturbed least, of memory the median.

    Other work on a machine only ever makes a program slower, so the fastest round says most about the program.
    """
    best: dict[str, Callable[[list[Any]], Any]] = {
        "prefill_ms_p50": min,
        "prefill_ms_p90": min,
        "prefill_tokens_per_s": max,
        "decode_tokens_per_s_p50": max,
        "decode_tokens_per_s_p90": max,
        "peak_memory_bytes": statistics.median_low,
        "memory_above_start_bytes": statistics.median_low,
    }
    found = {name: [v for speed in speeds if (v := getattr(speed, name)) is not None] for name in best}
    return replace(speeds[0], **{name: best[name](values) for name, values in found.items() if values})


def _check(settings: SpeedSettings) -> None:
    for name in ("prompt_tokens", "new_tokens", "repeats", "batch"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name}: got {getattr(settings, name)}, expected 1 or more")
    if settings.dtype not in {"auto", "float32", "bfloat16", "float16"}:
        raise InputError(f"dtype: got {settings.dtype!r}, expected auto, float32, bfloat16 or float16")


def _engine() -> str:
    from importlib.metadata import version

    return f"transformers {version('transformers')}, torch {version('torch')}"


def _context() -> Any:
    """The fork server's context, with the child's imports done beforehand; ``spawn`` where the system cannot fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.evaluation.speed_child"])
    return context


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the caller's script while a process starts: it would be imported, and so run, a second time in there."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _child(sender: Connection, folder: str, settings: dict[str, Any]) -> None:
    """The process's whole life: measure, send figures or one line of excuse."""
    import warnings

    warnings.simplefilter("ignore")
    try:
        from distill.evaluation.speed_child import measure

        sender.send(("done", measure(folder, SpeedSettings(**settings))))
    except BaseException as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        with suppress(OSError):  # nobody may be listening any more
            sender.send(("error", f"{type(error).__name__}: {first}" if first else type(error).__name__))
    finally:
        sender.close()


def _death(exit_code: int | None) -> str:
    if exit_code == -9:
        return "the process was killed (most often: out of memory)"
    return f"the process died (exit code {exit_code})"
