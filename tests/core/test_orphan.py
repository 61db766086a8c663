"""Processes that help a run end with it, also in the middle of their work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

STUCK = """
import time

class Stuck:
    def __reduce__(self):
        return time.sleep, (600,)

class Llama:
    def __init__(self, *given, **named):
        time.sleep(600)
"""
PARENTS = {
    "distill.trace.trace_process": (
        "from distill.trace.trace_process import Tracer\n"
        "import llama_cpp\n"
        "with Tracer() as tracer:\n"
        "    tracer.trace(llama_cpp.Stuck())\n"
    ),
    "distill.core.orphan": (
        "from pathlib import Path\n"
        "from distill.exporters.llama_cpp import check_engine\n"
        "check_engine(Path('model.gguf'))\n"
    ),
}
"""Word of the child's command line -> what starts it and waits for it."""


@pytest.mark.parametrize("word", PARENTS)
def test_a_child_ends_with_a_killed_run(word: str, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text(STUCK)  # a library that hangs while it loads a file
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    parent = subprocess.Popen([sys.executable, "-c", PARENTS[word]], env=os.environ | {"PYTHONPATH": path})
    children: list[psutil.Process] = []
    until = time.monotonic() + 120
    while not (children := [c for c in psutil.Process(parent.pid).children() if word in " ".join(c.cmdline())]):
        assert parent.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    time.sleep(2)  # it has come to where it hangs, or is still on its way
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    for child in alive:
        child.kill()
    assert alive == []


def test_a_child_that_comes_too_late_ends_at_once() -> None:
    code = "import sys; from distill.core.orphan import die_with; die_with(int(sys.argv[1])); print('lives')"
    for parent, expected in ((os.getpid(), (0, "lives\n")), (1, (1, ""))):
        done = subprocess.run([sys.executable, "-c", code, str(parent)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == expected
