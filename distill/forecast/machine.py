"""How fast this machine multiplies, and how much room its disk has; torch is not needed to ask."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distill.training.gpu_peaks import peak_of

MFU = 0.4
"""Share of a GPU's peak that a training of a dense model reaches; 0.35 to 0.5 is common on one node."""


@dataclass(frozen=True)
class Speed:
    """Of one process.

    Attributes:
        flops: per second, that a training can reach.
        is_bound: whether a training stays below it; else it is what one commonly reaches.
        words: where it is from.
    """

    flops: float
    is_bound: bool
    words: str


@cache
def gpu_speed() -> Speed | None:
    """Of this machine's first GPU; None when there is none, or one whose speed is not known."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        query = [tool, "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None
    if (peak := peak_of(name)) is None:
        return None
    return Speed(MFU * peak, False, f"{MFU:.0%} of the {peak / 1e12:,.0f} TFLOP/s of a {name.strip()}")


@cache
def cpu_speed() -> Speed:
    """Of this machine's processors together: what a product of two matrices in fp32 reaches here, now."""
    import numpy as np

    size = 768
    a = b = np.ones((size, size), np.float32)
    best = 0.0
    a @ b  # starts the library's threads
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return Speed(best, True, f"the {best / 1e9:,.0f} GFLOP/s at which this machine multiplies matrices")


def free_bytes(folder: Path) -> tuple[int, Path]:
    """Free bytes of the disk on which a folder is or would be, and the nearest folder above it that is there."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free, place


def duration(seconds: float) -> str:
    """Seconds for people, to two digits at most."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{float(f'{seconds / length:.2g}'):,.0f} {unit}"
    return f"{round(seconds)} seconds" if seconds >= 1.5 else "a second"
