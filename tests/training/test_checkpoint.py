from __future__ import annotations

import errno
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.core.errors import InputError, MachineError
from distill.training import checkpoint
from distill.training.checkpoint import (
    AtomicCheckpointIO,
    check_provenance,
    checkpoint_path,
    checkpoints,
    copied,
    newest_valid,
    rotate,
)


def save(folder: Path, step: int) -> Path:
    path = checkpoint_path(folder, step)
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "weights": torch.arange(1000.0)}, path)
    return path


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    path = save(tmp_path, 5)
    before = path.read_bytes()

    def half(checkpoint: Any, target: Path) -> None:
        Path(target).write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(MachineError, match=r"step=00000005.ckpt: checkpoint cannot be written"):
        save(tmp_path, 5)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done, replace = checkpoint_path(tmp_path, 7), [], os.replace
    monkeypatch.setattr(checkpoint, "sync", lambda place: done.append(f"sync {place.name}"))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(f"rename to {new.name}"), replace(old, new)))
    save(tmp_path, 7)
    assert done == [f"sync .{path.name}.writing", f"rename to {path.name}", f"sync {tmp_path.name}"]


def test_a_kill_in_the_middle_leaves_the_old_file_and_the_rest_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 5)

    class Killed(BaseException):
        pass

    def half(checkpoint: Any, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            save(tmp_path, 6)
    assert newest_valid(tmp_path) == (path, [])
    assert checkpoints(tmp_path) == [path]
    assert newest_valid(tmp_path / "none") == (None, [])
    save(tmp_path, 6)
    assert len(list(tmp_path.iterdir())) == 2


def test_steps_are_ordered_by_number_and_rotated(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    (tmp_path / "step=final.ckpt").write_text("of somebody else")
    assert [p.name for p in checkpoints(tmp_path)] == [f"step={step:08d}.ckpt" for step in (100, 10, 9)]
    rotate(tmp_path, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step=00000100.ckpt", "step=00000010.ckpt"]
    assert (tmp_path / "step=final.ckpt").exists()


class Malicious:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("marker"),)


def _flip(content: bytes) -> bytes:
    middle = content.find(torch.arange(1000.0).numpy().tobytes()) + 2000
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _compressed(content: bytes) -> bytes:
    """The first entry's content is said to be compressed."""
    method = content.find(b"PK\x01\x02") + 10
    return content[:method] + bytes([8]) + content[method + 1 :]


def _longer_header(content: bytes) -> bytes:
    """The last entry's content is said to begin far behind the end of the file."""
    length = content.rfind(b"PK\x03\x04") + 29
    return content[:length] + bytes([content[length] ^ 0xFF]) + content[length + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        _compressed,
        _longer_header,
        lambda content: content[:-200],
        lambda content: b"",
        lambda content: b"text",
        _flip,
        lambda content: pickle.dumps(Malicious()),
    ],
    ids=["compression", "header", "truncated", "empty", "text", "one bit", "code"],
)
def test_a_damaged_newest_falls_back_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    monkeypatch.chdir(tmp_path)
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    bad.write_bytes(spoil(bad.read_bytes()))
    found, (complaint,) = newest_valid(tmp_path)
    assert found == good
    assert complaint.startswith(f"{bad}: damaged (")
    assert "\n" not in complaint
    assert not Path("marker").exists()
    good.unlink()
    assert newest_valid(tmp_path)[0] is None


def test_code_within_a_whole_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"global_step": 3, "payload": Malicious()}, checkpoint_path(tmp_path, 3))
    found, complaints = newest_valid(tmp_path)
    assert found is None
    assert len(complaints) == 1
    assert not Path("marker").exists()


def test_what_is_written_behind_is_what_it_was_when_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two names of one tensor stay one; the next write waits for a slow one; old files go once the new one is there."""
    files, go_on, write = AtomicCheckpointIO(keep=1, behind=True), threading.Event(), torch.save
    held: list[list[str]] = []

    def slow(checkpoint: Any, target: Path) -> None:
        assert go_on.wait(60)
        held.append([path.name for path in checkpoints(tmp_path)])
        write(checkpoint, target)

    monkeypatch.setattr(torch, "save", slow)
    weight = torch.arange(4.0)
    state = {"state_dict": {"a": weight, "b": weight}, "optimizer_states": [{"state": {0: {"step": weight[:1]}}}]}
    files.save_checkpoint(state, checkpoint_path(tmp_path, 1))
    weight.mul_(2)
    assert checkpoints(tmp_path) == []
    files.settle(wait=False)
    go_on.set()
    files.save_checkpoint(state, checkpoint_path(tmp_path, 2))
    weight.zero_()
    first = torch.load(checkpoint_path(tmp_path, 1), weights_only=True)
    assert first["state_dict"]["a"].tolist() == [0, 1, 2, 3]
    assert first["state_dict"]["a"].data_ptr() == first["state_dict"]["b"].data_ptr()
    files.settle()
    second = torch.load(checkpoint_path(tmp_path, 2), weights_only=True)
    assert second["state_dict"]["b"].tolist() == [0, 2, 4, 6]
    assert second["optimizer_states"][0]["state"][0]["step"].tolist() == [0]
    assert held == [[], ["step=00000001.ckpt"]], "the old one is there until the new one is"
    assert [path.name for path in tmp_path.iterdir()] == ["step=00000002.ckpt"]


def test_a_write_behind_that_fails_is_told_once_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, path = AtomicCheckpointIO(keep=1, behind=True), save(tmp_path, 5)

    def full(checkpoint: Any, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    files.save_checkpoint({"global_step": 6}, checkpoint_path(tmp_path, 6))
    with pytest.raises(MachineError, match=r"step=00000006.ckpt: checkpoint cannot be written \(No space left"):
        files.settle()
    files.settle()
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_is_of_everything_in_the_machines_own_memory() -> None:
    numbers, whole = torch.arange(6).reshape(2, 3), {"step": 3, "nested": [(1, "a", None)]}
    made = copied({"turned": numbers.T, "part": numbers[1], "learned": torch.ones(1, requires_grad=True), **whole})
    assert torch.equal(made["turned"], numbers.T)
    assert torch.equal(made["part"], numbers[1])
    assert not made["learned"].requires_grad
    assert {key: made[key] for key in whole} == whole
    numbers.zero_()
    assert made["turned"].sum() == 15
    assert made["part"].sum() == 12


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path, ours = tmp_path / "step=00000001.ckpt", {"recipe": "aa", "teacher": "bb"}
    AtomicCheckpointIO().save_checkpoint({"provenance": ours}, path)
    check_provenance(path, ours)
    with pytest.raises(InputError, match=r"belongs to another training \(teacher differ\)"):
        check_provenance(path, ours | {"teacher": "cc"})


@pytest.mark.parametrize("step", [28, 30, 99_999_999, 9])
def test_a_checkpoint_of_another_name_is_not_believed(tmp_path: Path, step: int) -> None:
    older, path = save(tmp_path, 5), save(tmp_path, 10)
    renamed = path.rename(checkpoint_path(tmp_path, step))
    assert newest_valid(tmp_path) == (older, [f"{renamed}: damaged (its name has step {step}, its content step 10)"])


def test_steps_of_more_digits_are_newer(tmp_path: Path) -> None:
    newest, _ = (save(tmp_path, step) for step in (100_000_000, 99_999_999))
    assert newest_valid(tmp_path)[0] == newest


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(checkpoint_path(tmp_path, 3))
    assert newest_valid(tmp_path) == (None, [f"{checkpoint_path(tmp_path, 3)}: damaged (no regular file)"])


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("state_dict"),
        lambda state: state.update(loops=None),
        lambda state: state["loops"].clear(),
        lambda state: state["optimizer_states"].clear(),
        lambda state: state["state_dict"].pop("a"),
        lambda state: state["state_dict"].update(a=torch.zeros(7)),
        lambda state: state["state_dict"].update(a=state["state_dict"]["a"].half()),
        lambda state: state["loops"]["fit_loop"].update(ready=9),
        lambda state: state.update(more=1),
        lambda state: state.pop("check"),
    ],
)
def test_what_is_sealed_well_and_is_not_what_was_written_is_damaged(tmp_path: Path, change: Any) -> None:
    """``torch.save`` gives every file the right checksums."""
    older, path = (
        AtomicCheckpointIO().save_checkpoint(
            {
                "global_step": step,
                "state_dict": {"a": torch.randn(3)},
                "loops": {"fit_loop": {"ready": 3}},
                "optimizer_states": [{0: {"exp_avg": torch.zeros(3)}}],
            },
            checkpoint_path(tmp_path, step),
        )
        or checkpoint_path(tmp_path, step)
        for step in (1, 2)
    )
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    assert newest_valid(tmp_path) == (older, [f"{path}: damaged (its content is not what was written)"])
