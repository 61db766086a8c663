"""What a CPU build of PyTorch lacks to trace tensors of a GPU, compiled once into a cache folder and loaded.

It is ``guard.cpp``, 60 lines. A build with CUDA has it already.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from distill.core.artifact import hash_of
from distill.core.errors import MachineError

SOURCE = Path(__file__).with_name("guard.cpp")
COMPILERS = ("g++", "clang++", "c++")


def built() -> Path | None:
    """The compiled library, compiled now if it is not in the cache; None where PyTorch has CUDA.

    Raises:
        MachineError: this machine has no compiler, or it fails.
    """
    torch = _torch()
    if any((torch / "lib").glob("libtorch_cuda.*")):
        return None
    source = SOURCE.read_text(encoding="utf-8")
    name = hash_of(source, version("torch"), str(torch), sys.platform)
    library = cache_folder() / f"guard-{name}.so"
    if not library.is_file():
        _compile(torch, library)
    return library


def load(library: Path | None) -> None:
    """Load it into this process, before torch is imported: torch looks for devices once.

    Args:
        library: of :func:`built`.
    """
    if library is not None:
        assert "torch" not in sys.modules, "the guard must be loaded before torch"
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/distill``, or ``~/.cache/distill``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "distill"


def _torch() -> Path:
    """The folder of the package, without importing it."""
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _compile(torch: Path, library: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise MachineError(
            f"--trace compiles {SOURCE.name} once, and this machine has no C++ compiler ({', '.join(COMPILERS)}); "
            "install one, or trace on a machine that has one"
        )
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # another process may compile it as well
            made, lib = Path(folder) / library.name, torch / "lib"
            command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{torch / 'include'}", "-o", str(made)]
            command += [str(SOURCE), f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200]).strip()
                raise MachineError(f"--trace: {compiler} cannot compile {SOURCE} ({why}); try another compiler")
            os.replace(made, library)
    except OSError as error:
        raise MachineError(
            f"--trace: {library.parent} cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from error
