"""The state of a machine in a few lines that can be pasted into a bug report."""

from __future__ import annotations

import os
import platform
import shutil
import socket

from distill.core import threads
from distill.core.installed import conflicts
from distill.core.versions import versions


def examine() -> str:
    """Versions, devices, memory, disk, and whether the Hub and W&B can be used from here."""
    import psutil
    import torch

    from distill import __version__

    lines = [f"distill {__version__}  python {platform.python_version()}  {platform.platform()}"]
    lines.append("  ".join(f"{name} {number}" for name, number in versions().items()))
    lines += [f"conflict: {line}" for line in conflicts()]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append(f"GPU {index}: {properties.name}, {properties.total_memory / 1e9:.0f} GB")
    else:
        lines.append("no GPU: fine for the quickstart")
    lines += [threads.described(torch.get_num_threads()), threads.rule()]
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(os.getcwd())
    lines.append(
        f"{threads.available()} of {os.cpu_count()} CPUs usable, "
        f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free, "
        f"{disk.free / 1e9:.0f} GB disk free here"
    )
    reachable = _reachable("huggingface.co")
    lines.append(f"Hugging Face Hub: {'reachable' if reachable else 'not reachable: folders and caches only'}")
    from distill.tracking.spec import LoggingSpec
    from distill.tracking.wandb import resolve_mode

    lines.append(f"W&B with wandb: auto would be {resolve_mode(LoggingSpec())}")
    return "\n".join(lines)


def _reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True
