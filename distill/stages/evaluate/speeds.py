"""Speed, memory and energy of the models and exports of an evaluate stage, in rounds over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.evaluation.engine import Opening
from distill.evaluation.speed import Speed, measure_speed, quietest
from distill.reporting.tradeoff import Row, SpeedPoint
from distill.stages.evaluate.measured_exports import ModelFile
from distill.stages.evaluate.spec import SpeedSpec
from distill.stages.progress_lines import ProgressLines
from distill.stages.session import StageContext
from distill.tracking.counters import Counters
from distill.training.trainer import dtype_on, resolve_device


def measured_speeds(
    context: StageContext, spec: SpeedSpec, rows: Sequence[Row], files: Sequence[ModelFile]
) -> dict[str, dict[str, Any]]:
    """Row name -> its speed columns. All models in turn, in rounds: what disturbs the machine for some seconds does
    not stay with one model, and an export and the teacher's file beside it are measured one after the other.

    Args:
        context: of the stage.
        spec: how.
        rows: of everything that is measured.
        files: those of them that are exports.

    Raises:
        MachineError: one cannot be run; one line.
    """
    device, named = resolve_device(context.session.compute), {file.name: file for file in files}
    openings = {
        row.name: named[row.name].opening(context)
        if row.name in named
        else Opening(context.session.artifact(row.name).location, device=device, dtype=dtype_on(device))
        for row in rows
        if row.install is None
    }
    measured: dict[str, list[Speed]] = {name: [] for name in openings}
    progress = ProgressLines(context, spec.rounds * len(openings), ("speed", "measurements"))
    kernels = {row.name: row.kernel for row in rows}
    for _ in range(spec.rounds):
        for name, opening in openings.items():
            measured[name].append(progress.count(_speed(spec, opening, kernels[name])))
    found = {name: _columns(spec, quietest(speeds)) for name, speeds in measured.items()}
    for name, file in named.items():
        if name in found:  # how its weights are stored is its scheme
            found[name] |= {"dtype": None} if file.target.engine_module is not None else {}
    return {row.name: found.get(row.name, {}) for row in rows}


def _speed(spec: SpeedSpec, opening: Opening, kernel: Any) -> Speed:
    return measure_speed(
        opening.location,
        kernel=kernel,
        prompt_tokens=spec.prompt_tokens,
        new_tokens=spec.new_tokens,
        repeats=spec.repeats,
        batch=spec.batch_size,
        device=opening.device,
        dtype=opening.dtype,
        grid=spec.grid(),
        module=opening.module,
        kv_cache=opening.kv_cache,
        counters=Counters,
        timeout_s=spec.timeout_s,
    )


def _columns(spec: SpeedSpec, speed: Speed) -> dict[str, Any]:
    main = (spec.batch_size, spec.prompt_tokens)
    points = sorted(speed.points, key=lambda point: ((point.batch, point.prompt_tokens) != main, point.batch))
    return {
        "prefill_ms": speed.prefill_ms_p50,
        "decode_tokens_per_s": speed.decode_tokens_per_s_p50,
        "decode_tokens_per_s_p90": speed.decode_tokens_per_s_p90,
        "peak_memory_bytes": speed.peak_memory_bytes,
        "memory_above_start_bytes": speed.memory_above_start_bytes,
        "prefill_joules": speed.prefill_joules_per_1000,
        "decode_joules": speed.decode_joules_per_1000,
        "cpu_load": speed.cpu_load,
        "gpu_load": speed.gpu_load,
        "speeds": tuple(
            SpeedPoint(
                point.batch,
                point.prompt_tokens,
                point.prefill_tokens_per_s,
                point.decode_tokens_per_s_p50,
                point.peak_memory_bytes,
            )
            for point in points
        ),
        "engine": speed.engine,
        "device": speed.device,
        "dtype": speed.dtype,
    }
