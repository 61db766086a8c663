"""Resources used by each stage: time, load, memory, energy and cost, from the samples in ``hardware.jsonl``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distill.tracking.spec import Price

GAP_S = 30.0
"""Longer gaps between two samples are not counted: the process was suspended, or the clock was changed."""


_NEVER = object()


@dataclass(frozen=True)
class Usage:
    """Resources used by one stage, summed over all processes that ran it.

    Attributes:
        stage: name of the stage.
        seconds: running time.
        device_seconds: running time multiplied by the number of GPUs (by 1 without a GPU).
        cpu: mean load of all processors, in percent.
        memory_bytes: peak memory of the first process of the run and its children.
        num_gpus: number of GPUs.
        gpu: mean utilization of the GPUs, in percent; None without a GPU.
        gpu_memory_bytes: peak memory of a single GPU; None without a GPU.
        joules: "cpu" or "gpu" -> energy; only for parts that have an energy counter.
    """

    stage: str
    seconds: float
    device_seconds: float
    cpu: float
    memory_bytes: int
    num_gpus: int
    gpu: float | None
    gpu_memory_bytes: int | None
    joules: Mapping[str, float]

    def energy(self) -> str:
        """Energy as text; "not measured" without a counter."""
        if not self.joules:
            return "not measured"
        parts = [f"{energy_words(joules)} ({part.upper()})" for part, joules in sorted(self.joules.items())]
        return " + ".join(parts)

    def cost(self, price: Price | None) -> str | None:
        """Cost at the recipe's price; None without a price."""
        if price is None:
            return None
        hours = (self.device_seconds if price.per == "device" else self.seconds) / 3600
        return f"{hours * price.per_hour:,.2f} {price.currency}"


def usages(samples: Sequence[Mapping[str, Any]]) -> list[Usage]:
    """Usage of each stage, in the order in which they first ran."""
    names = dict.fromkeys(sample["stage"] for sample in samples if sample["stage"])
    return [_usage(name, samples) for name in names]


def _usage(name: str, samples: Sequence[Mapping[str, Any]]) -> Usage:
    own = [sample for sample in samples if sample["stage"] == name]
    seconds, device_seconds, loads = 0.0, 0.0, list[tuple[float, float]]()
    for before, after in pairwise(samples):
        passed = after["at"] - before["at"]
        if after["stage"] == name and before.get("session") == after.get("session") and 0 < passed <= GAP_S:
            seconds += passed
            device_seconds += passed * max(1, len(_gpus(after)))
            loads.append((float(after.get("cpu", 0.0)), passed))
    gpus = [gpu for sample in own for gpu in _gpus(sample)]
    busy = [gpu["utilization"] for gpu in gpus if "utilization" in gpu]
    return Usage(
        stage=name,
        seconds=seconds,
        device_seconds=device_seconds,
        cpu=sum(load * passed for load, passed in loads) / seconds if seconds else 0.0,
        memory_bytes=max((int(sample.get("memory", 0)) for sample in own), default=0),
        num_gpus=len({gpu.get("index") for gpu in gpus}),
        gpu=_mean(busy),
        gpu_memory_bytes=max((int(gpu["memory"]) for gpu in gpus if "memory" in gpu), default=None),
        joules=_joules(name, samples),
    )


def _joules(name: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """ "cpu" or "gpu" -> energy: the sum of the counter's increments between successive samples that contain it."""
    found, last = dict[str, float](), dict[str, tuple[Any, float, float]]()
    for sample in samples:
        for part, count in _numbers(sample.get("joules")).items():
            session, at, before = last.get(part, (_NEVER, 0.0, 0.0))
            last[part] = sample.get("session"), sample["at"], count
            is_near = session == sample.get("session") and sample["at"] - at <= GAP_S
            if sample["stage"] == name and is_near:
                found[part] = found.get(part, 0.0) + max(0.0, count - before)
    return found


def _gpus(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [gpu for gpu in sample.get("gpus") or () if isinstance(gpu, dict)]


def _numbers(value: Any) -> Mapping[str, float]:
    return value if isinstance(value, dict) else {}


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def energy_words(joules: float) -> str:
    """Energy in J or kWh, as text."""
    return f"{joules / 3.6e6:,.2f} kWh" if joules >= 3.6e5 else f"{joules:,.0f} J"
