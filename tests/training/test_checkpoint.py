from __future__ import annotations

import errno
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.core.errors import InputError, MachineError
from distill.training.checkpoint import (
    AtomicCheckpointIO,
    check_made_of,
    checkpoint_path,
    checkpoints,
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


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-200],
        lambda content: b"",
        lambda content: b"text",
        _flip,
        lambda content: pickle.dumps(Malicious()),
    ],
    ids=["truncated", "empty", "text", "one bit", "code"],
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


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path, ours = tmp_path / "step=00000001.ckpt", {"recipe": "aa", "teacher": "bb"}
    AtomicCheckpointIO().save_checkpoint({"made_of": ours}, path)
    check_made_of(path, ours)
    with pytest.raises(InputError, match=r"it is of another training \(teacher differ\)"):
        check_made_of(path, ours | {"teacher": "cc"})
