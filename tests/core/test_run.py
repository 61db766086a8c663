"""A run folder: markers, work that is moved aside, and the lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.core.errors import InputError
from distill.core.run_folder import Run
from distill.core.stored import write_checked


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_a_stage_is_done_when_it_says_so(run: Run) -> None:
    run.begin("prune", "aa")
    assert run.done("prune") is None
    done = run.finish("prune", "aa", 1.235, {"parameters": 3})
    assert run.done("prune") == done
    assert (done.input_hash, done.seconds, done.figures) == ("aa", 1.235, {"parameters": 3})
    assert done.made != run.finish("prune", "aa", 1.235, {"parameters": 3}).made
    assert run.model("prune").location == str(run.folder / "prune" / "model")


def test_begin_goes_on_with_work_of_the_same_inputs(run: Run) -> None:
    (run.begin("distill", "aa") / "checkpoint").write_text("half")
    assert (run.begin("distill", "aa") / "checkpoint").read_text() == "half"
    assert [path.name for path in run.folder.iterdir()] == ["distill"]


def test_begin_moves_work_of_other_inputs_aside(run: Run) -> None:
    for number, inputs in enumerate(("aa", "bb", "cc")):
        folder = run.begin("distill", inputs)
        assert [path.name for path in folder.iterdir()] == ["INPUT"]
        (folder / "result").write_text(str(number))
    aside = [(run.folder / f"distill.old-{number}" / "result").read_text() for number in (1, 2)]
    assert aside == ["0", "1"]


@pytest.mark.parametrize("within", ["checkpoints", "checkpoints/candidate-1/checkpoints"])
def test_a_training_that_was_left_is_known(run: Run, within: str) -> None:
    checkpoint = run.begin("distill", "aa") / within / "step=00000003.ckpt"
    assert run.has_begun("distill", "aa")
    assert not run.has_begun("distill", "bb")
    assert not run.is_left("distill")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert run.is_left("distill")
    run.finish("distill", "aa", 1.0, {})
    assert not run.is_left("distill")


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_as_a_stage_begins_leaves_nothing_to_move_aside(
    run: Run, monkeypatch: pytest.MonkeyPatch, rename: int
) -> None:
    """The marker is renamed, then the folder with it."""
    real, calls = os.replace, 0

    def replace(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == rename:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        run.begin("distill", "aa")
    said: list[str] = []
    assert [path.name for path in run.begin("distill", "aa", said.append).iterdir()] == ["INPUT"]
    assert [path.name for path in run.folder.iterdir()] == ["distill"]
    assert said == []


def test_what_was_moved_aside_is_told_as_it_is(run: Run) -> None:
    said: list[str] = []
    (run.begin("distill", "aa") / "mine").touch()
    run.begin("distill", "bb", said.append)
    assert said == ["  its inputs have changed; what was there is now distill.old-1"]
    (run.folder / "prune").mkdir()
    run.begin("prune", "aa", said.append)
    (run.folder / "export").mkdir()
    (run.folder / "export" / "mine").touch()
    run.begin("export", "aa", said.append)
    assert said[1:] == ["  a folder export that no run has begun was there; it is now export.old-1"]


def test_a_result_is_only_what_the_stage_left(run: Run) -> None:
    folder = run.begin("prune", "aa")
    (folder / "plan.json").write_text("{}")
    assert run.result("prune", "plan.json") is None  # not finished
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step=00000001.ckpt").touch()
    run.finish("prune", "aa", 1.0, {})
    assert not (folder / "checkpoints").exists()
    (folder / "scores.safetensors").touch()
    assert run.result("prune", "scores.safetensors") is None  # somebody else's
    assert run.result("prune", "plan.json") == folder / "plan.json"
    (folder / "plan.json").write_text("[]")
    with pytest.raises(InputError, match=rf"^{folder}/plan.json: is not what stage prune made .*by --from prune$"):
        run.result("prune", "plan.json")


def test_a_marker_leads_nowhere_else(run: Run) -> None:
    run.begin("prune", "aa")
    mark = {"bytes": 0, "mtime_ns": 0, "sha256": "0" * 64}
    for name in ("../other/file", "/etc/passwd"):
        content = {"input_hash": "aa", "seconds": 1.0, "figures": {}, "files": {name: mark}, "made": "x"}
        write_checked(run.stage("prune") / "DONE", content, about="prune")
        with pytest.raises(InputError, match="is not within the stage's folder"):
            run.done("prune")


def test_begin_moves_a_folder_without_a_marker_aside(run: Run) -> None:
    (run.folder / "distill").mkdir(parents=True)
    (run.folder / "distill" / "mine").write_text("precious")
    run.begin("distill", "aa")
    assert (run.folder / "distill.old-1" / "mine").read_text() == "precious"


def test_the_lock_keeps_a_second_process_out_and_names_the_first(run: Run) -> None:
    code = (
        "import sys, pathlib\n"
        "from distill.core.errors import InputError\n"
        "from distill.core.run_folder import Run\n"
        "try:\n"
        "    with Run(pathlib.Path(sys.argv[1])).lock(): print('got it')\n"
        "except InputError as error: print(error)\n"
    )

    def other() -> str:
        return subprocess.run([sys.executable, "-c", code, str(run.folder)], capture_output=True, text=True).stdout

    with run.lock():
        assert f"in use by process {os.getpid()} on " in other()
    assert other() == "got it\n"


def test_the_lock_of_a_process_that_was_killed_is_free(run: Run) -> None:
    code = (
        "import os, sys, pathlib\n"
        "from distill.core.run_folder import Run\n"
        "with Run(pathlib.Path(sys.argv[1])).lock(): os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run.folder)]).returncode == -9
    with run.lock():
        pass


def test_the_lock_holds_within_a_process_too(run: Run) -> None:
    with run.lock(), pytest.raises(InputError, match="in use by"), run.lock():
        pass


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="cannot be used as a run folder"), Run(tmp_path / "run").lock():
        pass


def test_a_process_that_was_forked_does_not_hold_the_lock(run: Run) -> None:
    """A loader's workers outlive a kill by seconds, and a restart must not wait for them."""
    read, write = os.pipe()
    with run.lock():
        child = os.fork()
        if child == 0:
            os.write(write, b".")
            signal.pause()
        os.read(read, 1)
    try:
        with run.lock():
            assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it lives, and holds nothing
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
