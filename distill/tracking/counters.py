"""What can be read of the machine at one moment: processors, memory, GPUs, and energy where there is a counter of it.

A GPU is read through NVIDIA's management library (``pip install nvidia-ml-py``), which never touches CUDA; the energy
of the CPU packages through RAPL, which Linux shows to root alone (CVE-2020-8694). What cannot be read is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

RAPL = Path("/sys/class/powercap")
SHORTEST_S = 0.05
"""If fewer CPU seconds have passed since the last sample, the last load is returned: the kernel counts hundredths."""


class Counters:
    """Reads a machine. Open it where it is used; it holds no thread.

    Args:
        nvml: stands for the module ``pynvml``; None imports it where it is installed.
        rapl: folder of the kernel's power caps.
    """

    def __init__(self, nvml: Any = None, rapl: Path = RAPL):
        self._nvml = nvml if nvml is not None else _pynvml()
        self._handles: list[tuple[int, Any]] = []
        if self._nvml is not None:
            try:
                self._nvml.nvmlInit()
                self._handles = _visible(self._nvml)
            except Exception:  # no driver, or one of another version: as if there were no GPU
                self._nvml = None
        self._packages = [
            _Package(file) for file in sorted(rapl.glob("intel-rapl:[0-9]*/energy_uj")) if _can_be_read(file)
        ]
        self._process = psutil.Process()
        self._cpu_s, self._load = _cpu_seconds(), 0.0

    def sample(self) -> dict[str, Any]:
        """One look.

        Returns:
            ``cpu`` (percent of all processors, since the call before), ``memory`` (bytes that this process and its
            children hold), ``memory_used`` (bytes of the machine), ``gpus``, and ``joules``: part -> counter, where
            there is one.
        """
        found: dict[str, Any] = {
            "cpu": self._cpu_load(),
            "memory": self._held(),
            "memory_used": psutil.virtual_memory().used,
        }
        if gpus := self.gpus():
            found["gpus"] = gpus
        if joules := self.joules():
            found["joules"] = joules
        return found

    def gpus(self) -> list[dict[str, Any]]:
        """What each visible GPU does; only what can be read of it."""
        return [self._gpu(index, handle) for index, handle in self._handles]

    def joules(self) -> dict[str, float]:
        """Energy counters: "cpu" or "gpu" -> J. Reads nothing else, which would take time and energy of its own."""
        found = {"cpu": sum(package.joules() for package in self._packages)} if self._packages else {}
        if self._handles:
            with suppress(Exception):  # not of this device: no energy before Volta, or under MIG
                found["gpu"] = sum(map(self._gpu_joules, (handle for _, handle in self._handles)))
        return found

    def _gpu_joules(self, handle: Any) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3  # mJ since the driver was loaded

    def _cpu_load(self) -> float:
        # of our own two readings: psutil.cpu_percent counts from the latest call of anyone in this process
        (before, busy_before), (now, busy) = self._cpu_s, _cpu_seconds()
        if now - before >= SHORTEST_S:
            self._load = round(min(100.0, max(0.0, 100 * (busy - busy_before) / (now - before))), 1)
            self._cpu_s = now, busy
        return self._load

    def close(self) -> None:
        """Give the library back."""
        if self._nvml is not None:
            with suppress(Exception):
                self._nvml.nvmlShutdown()

    def _held(self) -> int:
        total = 0
        with suppress(psutil.Error):
            for process in [self._process, *self._process.children(recursive=True)]:
                with suppress(psutil.Error):
                    total += process.memory_info().rss
        return total

    def _gpu(self, index: int, handle: Any) -> dict[str, Any]:
        nvml = self._nvml
        readings: dict[str, Callable[[], float]] = {
            "utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,  # percent
            "memory": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "memory_total": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
            "power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,  # mW
            "temperature": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        }
        found: dict[str, Any] = {"index": index}
        for name, read in readings.items():
            with suppress(Exception):  # not of this device: no energy before Volta, or under MIG
                found[name] = read()
        return found


class _Package:
    """The energy of one CPU package, whose counter wraps around."""

    def __init__(self, file: Path):
        self._file, self._range = file, int((file.parent / "max_energy_range_uj").read_text())
        self._last, self._sum = int(file.read_text()), 0

    def joules(self) -> float:
        """Since this object was made."""
        now = int(self._file.read_text())
        self._sum += (now - self._last) % (self._range + 1)
        self._last = now
        return self._sum / 1e6


def _cpu_seconds() -> tuple[float, float]:
    """(all, busy) seconds of all processors since the machine started."""
    times = psutil.cpu_times()._asdict()
    for part in ("guest", "guest_nice"):  # Linux counts them in user and nice
        times.pop(part, None)
    total = sum(times.values())
    return total, total - times["idle"] - times.get("iowait", 0.0)


def _can_be_read(file: Path) -> bool:
    """Whether a counter may be read; only packages count, as cores and memory are parts of them."""
    with suppress(OSError, ValueError):
        return int(file.read_text()) >= 0 and int((file.parent / "max_energy_range_uj").read_text()) > 0
    return False


def _pynvml() -> Any:
    with suppress(ImportError):
        import pynvml  # type: ignore[import-not-found, unused-ignore]

        return pynvml
    return None


def _visible(nvml: Any) -> list[tuple[int, Any]]:
    """(number, handle) of the GPUs that ``CUDA_VISIBLE_DEVICES`` leaves to this process, or of all."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if wanted is None:
        return list(enumerate(handles))
    found = []
    for name in filter(None, (part.strip() for part in wanted.split(","))):
        for index, handle in enumerate(handles):
            uuid = nvml.nvmlDeviceGetUUID(handle)
            if name == str(index) or (uuid.decode() if isinstance(uuid, bytes) else uuid).startswith(name):
                found.append((index, handle))
    return found
