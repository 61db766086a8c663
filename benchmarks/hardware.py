"""The machine and the package versions of a measurement. Needs only torch, so the peers' environments can use it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "pytorch-lightning")


def describe(num_threads: int | None = None) -> dict[str, Any]:
    """The machine: ``cpu``, ``cores_used``, ``memory_gb``, ``gpu`` (None without one) and ``os``.

    Args:
        num_threads: number of threads of the benchmark; None for torch's own number.
    """
    return {
        "cpu": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores_used": f"{num_threads or torch.get_num_threads()} of {os.cpu_count()}",
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def versions(*packages: str) -> dict[str, str]:
    """Package -> version, for the common packages and ``packages``; packages that are not installed are omitted."""
    found = {}
    for name in (*PACKAGES, *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
