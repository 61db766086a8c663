"""Stopping and going on gives, bit for bit, what an undisturbed training gives."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.core import listener, stop
from distill.core.errors import DistillError, InputError, Interrupted, MachineError, Preempted
from distill.quantization import Int8Channel, IntGroup
from distill.training.checkpoint import AtomicCheckpointIO, checkpoint_path, checkpoints
from distill.training.metrics import read_rows
from distill.training.module import DistillationModule
from distill.training.saver import STEP_S

BATCH = 4
pytestmark = pytest.mark.usefixtures("as_on_a_terminal")


class PulledPlug(Exception):
    """Stands for a kill: nothing of ours may react to it."""


def pull() -> None:
    raise PulledPlug


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def left_by(folder: Path) -> dict[str, Any]:
    """What the last checkpoint holds, and the rows of the metrics without the clock and the memory."""
    kept = torch.load(checkpoint_path(folder / "checkpoints", 6), weights_only=True)
    measured = ("perf/", "memory/")
    rows = [{k: v for k, v in row.items() if not k.startswith(measured)} for row in read_rows(folder)]
    return {key: kept[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "ranks", "global_step")} | {
        "rows": rows
    }


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal to the last bit, all the way down."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize(
    ("way", "compute"),
    [
        ("full", {}),
        ("tied", {}),
        ("masked", {}),
        ("lora", {}),
        ("lora tied", {}),
        ("quant", {}),
        ("quant lora head", {"precision": "bf16-mixed"}),
        ("quant learned", {}),
        ("quant learned lora", {"gradient_checkpointing": True}),
        ("quant held=2", {"precision": "bf16-true"}),
        ("quant learned lora held=3", {"gradient_checkpointing": True}),
        ("quant learned held=4", {}),
        ("quant learned late=3", {}),
        ("quant learned lora late=2", {}),
        ("full", {"gradient_checkpointing": True}),
    ],
)
def test_a_kill_changes_no_bit(way: str, compute: Any, module: Any, train: Any, tmp_path: Path) -> None:
    """Checkpoints are made at steps 3 and 6, validation at 2, 4 and 6, rows of metrics at 2, 4 and 6."""
    settings = {"attention_dropout": 0.1, "tie_word_embeddings": "tied" in way}
    torch.manual_seed(3)
    train(module(way, **settings), "straight", **compute)
    torch.manual_seed(3)
    with pytest.raises(PulledPlug):
        train(module(way, **settings), "resumed", at={4 * BATCH: pull}, **compute)
    assert [p.name for p in checkpoints(tmp_path / "resumed" / "checkpoints")] == ["step=00000003.ckpt"]
    torch.manual_seed(4)  # the process that goes on is another one
    said = train(module(way, **settings), "resumed", **compute)
    assert said == ["  resuming from step 3 of 6 (step=00000003.ckpt)"]
    straight, resumed = left_by(tmp_path / "straight"), left_by(tmp_path / "resumed")
    assert len(straight["rows"]) == 6
    assert_same(resumed, straight)


def test_steps_that_are_made_while_a_checkpoint_is_written_are_not_in_it(
    module: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of step 3 is written when steps 4 and 5 are made already, and gone on from as any other."""
    way, settings = "quant learned", {"attention_dropout": 0.1, "tie_word_embeddings": True}
    torch.manual_seed(3)
    train(module(way, **settings), "straight")
    are_made, write = threading.Event(), torch.save

    def slow(checkpoint: Any, target: Path) -> None:
        assert are_made.wait(60)
        write(checkpoint, target)

    def two_steps_later() -> None:
        assert checkpoints(tmp_path / "behind" / "checkpoints") == []
        are_made.set()
        raise PulledPlug

    torch.manual_seed(3)
    monkeypatch.setattr(torch, "save", slow)
    with pytest.raises(PulledPlug):
        train(module(way, **settings), "behind", at={5 * BATCH: two_steps_later}, write_checkpoints="behind")
    train(module(way, **settings), "behind", write_checkpoints="behind")
    assert len(checkpoints(tmp_path / "behind" / "checkpoints")) == 2
    assert_same(left_by(tmp_path / "behind"), left_by(tmp_path / "straight"))
    ours, theirs = (checkpoint_path(tmp_path / name / "checkpoints", 3) for name in ("behind", "straight"))
    assert_same(*({**torch.load(file, weights_only=True), "seconds": 0.0, "check": ""} for file in (ours, theirs)))
    assert ours.stat().st_size <= theirs.stat().st_size, "a weight of two names is written once"


@pytest.mark.parametrize("write", ["at_once", "behind"])
def test_a_disk_that_is_full_ends_the_run_however_it_is_written(
    write: str, module: Any, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(checkpoint: Any, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    line = r"step=00000003.ckpt: checkpoint cannot be written \(No space left on device\)$"
    with pytest.raises(MachineError, match=line):
        train(module(), write_checkpoints=write)


def test_a_stop_waits_for_what_is_being_written(
    module: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = torch.save

    def slow(checkpoint: Any, target: Path) -> None:
        time.sleep(0.2)
        write(checkpoint, target)

    monkeypatch.setattr(torch, "save", slow)
    with pytest.raises(Interrupted, match=r"stopped at step 4 of 6, which is saved"):
        train(module(), at={4 * BATCH - 2: ctrl_c}, write_checkpoints="behind")
    folder = tmp_path / "stage" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step=00000003.ckpt", "step=00000004.ckpt"]
    train(module(), write_checkpoints="behind")
    assert checkpoints(folder)[0].name == "step=00000006.ckpt", "and so does the end"


@pytest.mark.parametrize("write", ["at_once", "behind"])
def test_the_last_step_is_on_disk_before_its_validation_begins(
    write: str, module: Any, train: Any, tmp_path: Path
) -> None:
    """Whatever becomes of that: it is done by whoever goes on, and no step is made again."""
    torch.manual_seed(3)
    train(module(attention_dropout=0.1), "straight")
    kept: list[list[str]] = []

    def third() -> None:
        kept.append([file.name for file in checkpoints(tmp_path / "late" / "checkpoints")])
        if len(kept) == 3:
            raise PulledPlug

    settings: dict[str, Any] = {"write_checkpoints": write, "checkpoint_every_steps": 100}
    torch.manual_seed(3)
    with pytest.raises(PulledPlug):
        train(module(attention_dropout=0.1), "late", at={500: third}, **settings)
    assert kept == [[], [], ["step=00000006.ckpt"]], "validation is due after steps 2, 4 and 6"
    again = train(module(attention_dropout=0.1), "late", **settings)
    assert again == ["  resuming from step 6 of 6 (step=00000006.ckpt)"]
    assert_same(left_by(tmp_path / "late"), left_by(tmp_path / "straight"))


def test_scales_are_held_from_their_step_on(module: Any, train: Any, tmp_path: Path) -> None:
    for folder, way in (("free", "quant"), ("held", "quant held=3")):
        train(module(way), folder)
    kept = {
        (folder, step): torch.load(checkpoint_path(tmp_path / folder / "checkpoints", step), weights_only=True)
        for folder in ("free", "held")
        for step in (3, 6)
    }
    assert_same(kept["held", 3]["state_dict"], kept["free", 3]["state_dict"])
    name, before = "student.model.layers.0.mlp.up_proj", kept["free", 3]["state_dict"]
    after = kept["held", 6]["state_dict"]
    held = after[f"{name}.held_scale"].view(torch.bfloat16)
    assert torch.equal(held, Int8Channel().quantize(before[f"{name}.weight"]).scale)
    assert not torch.equal(held, Int8Channel().quantize(after[f"{name}.weight"]).scale)
    assert not torch.equal(after[f"{name}.weight"], kept["free", 6]["state_dict"][f"{name}.weight"])


def test_a_scale_is_learned_from_where_the_weights_are_when_rounding_begins(
    module: Any, train: Any, tmp_path: Path
) -> None:
    train(module("quant learned late=3 held=3", lr=0.1))
    before, after = (
        torch.load(checkpoint_path(tmp_path / "stage" / "checkpoints", step), weights_only=True)["state_dict"]
        for step in (3, 6)
    )
    name, grid = "student.model.layers.0.mlp.up_proj", IntGroup(bits=3, group_size=8, scale="learned")
    began = after[f"{name}.held_scale"].view(torch.bfloat16).float()
    torch.testing.assert_close(began, grid.quantize(before[f"{name}.weight"]).scale.float(), rtol=0.01, atol=0)
    stale = before[f"{name}.log_scale"].exp().view_as(began)
    assert ((began / stale).log().abs() > 0.1).float().mean() > 0.5


def test_dropout_does_act(module: Any, train: Any, tmp_path: Path) -> None:
    """Else the test above would say nothing about the random state."""
    for folder, seed in (("one", 3), ("two", 4)):
        torch.manual_seed(seed)
        train(module(attention_dropout=0.1), folder)
    with pytest.raises(AssertionError):
        assert_same(left_by(tmp_path / "one")["state_dict"], left_by(tmp_path / "two")["state_dict"])


@pytest.mark.parametrize(("first", "then"), [(4, 1), (1, 4), (2, 1)])
def test_another_micro_batch_size_takes_the_same_steps(
    first: int, then: int, module: Any, train: Any, tmp_path: Path
) -> None:
    train(module(), "straight")
    with pytest.raises(PulledPlug):
        train(module(), "resumed", micro=first, at={4 * BATCH: pull})
    train(module(), "resumed", micro=then)
    straight, resumed = left_by(tmp_path / "straight"), left_by(tmp_path / "resumed")
    for name, weight in straight["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
    assert [row["step"] for row in resumed["rows"]] == [row["step"] for row in straight["rows"]]


def test_ctrl_c_saves_the_step_and_gives_the_handler_back(module: Any, train: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    train(module(), "straight")
    torch.manual_seed(3)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped at step 2 of 6, which is saved") as stopped:
        train(module(), "resumed", at={2 * BATCH - 2: ctrl_c})  # within the second step
    assert stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in checkpoints(tmp_path / "resumed" / "checkpoints")] == ["step=00000002.ckpt"]
    train(module(), "resumed")
    assert_same(left_by(tmp_path / "resumed"), left_by(tmp_path / "straight"))


def test_a_step_and_its_checkpoint_may_each_take_longer_than_anything_else(
    module: Any, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the exception would be raised at the end of PATIENCE_S, in the middle of the step or of the save."""
    monkeypatch.setattr(listener, "PATIENCE_S", 0.0)
    heard: list[tuple[float, bool]] = []

    def long_step() -> None:
        ctrl_c()
        for _ in range(20):  # longer than the signal's thread takes to look at the bounds
            time.sleep(0.05)
        heard.append(bounds())

    def bounds() -> tuple[float, bool]:
        """How long this may take, and whether it is counted anew after the signal."""
        assert stop._listener is not None
        return stop._listener.patience_s, stop._listener.since > stop._listener.asked_at

    def write(checkpoint: Any, target: Path) -> None:
        heard.append(bounds())
        save(checkpoint, target)

    save = torch.save
    monkeypatch.setattr(torch, "save", write)
    with pytest.raises(Interrupted, match=r"stopped at step 2 of 6, which is saved"), stop.listening(), stop.patient():
        train(module(), at={2 * BATCH - 2: long_step})
    assert heard == [(STEP_S, False), (STEP_S, True)]


@pytest.mark.parametrize(("position", "step"), [(500, 4), (502, 4), (502, 6)])
def test_a_stop_does_not_wait_for_the_validation(
    position: int, step: int, module: Any, train: Any, tmp_path: Path
) -> None:
    """At its first batch or its last one, between steps or after the last of them; it is done when the run goes on."""
    seen = 0

    def term() -> None:
        nonlocal seen
        seen += 1
        if seen == step // 2:  # validation is due after steps 2, 4 and 6
            os.kill(os.getpid(), signal.SIGTERM)

    torch.manual_seed(3)
    train(module(attention_dropout=0.1), "straight")
    torch.manual_seed(3)
    with pytest.raises(Preempted, match=rf"stopped by SIGTERM at step {step} of 6, which is saved"):
        train(module(attention_dropout=0.1), "resumed", at={position: term}, checkpoint_every_steps=3)
    assert checkpoints(tmp_path / "resumed" / "checkpoints")[0].name == f"step=0000000{step}.ckpt"
    train(module(attention_dropout=0.1), "resumed")
    assert_same(left_by(tmp_path / "resumed"), left_by(tmp_path / "straight"))


def test_a_stop_after_the_last_look_is_not_lost(module: Any, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(DistillationModule, "on_fit_end", lambda module: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match=r"stopped by SIGTERM; the same command goes on"):
        train(module())
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_ctrl_c_stops_at_once(
    module: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "DEBOUNCE_S", 0.0)  # else the two would count as one

    def twice() -> None:
        ctrl_c()
        ctrl_c()
        for _ in range(600):  # a long sleep is not interrupted if another thread has received the signal
            time.sleep(0.1)

    with pytest.raises(Interrupted, match=r"^stopped; the same command goes on$"):
        train(module(), at={4 * BATCH - 2: twice})
    assert [p.name for p in checkpoints(tmp_path / "stage" / "checkpoints")] == ["step=00000003.ckpt"]


def test_any_error_gives_the_handler_back(module: Any, train: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(PulledPlug):
        train(module(), at={BATCH: pull})
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_training_is_taken_up_as_it_is(module: Any, train: Any, tmp_path: Path) -> None:
    trained = module()
    train(trained)
    again = module()
    assert train(again) == ["  resuming from step 6 of 6 (step=00000006.ckpt)"]
    assert_same(dict(again.student.state_dict()), dict(trained.student.state_dict()))


@pytest.mark.parametrize("way", ["full", "tied", "lora", "lora tied", "quant lora head"])
def test_a_checkpoint_holds_what_is_trained_and_loads_as_data(
    way: str, module: Any, train: Any, tmp_path: Path
) -> None:
    trained = module(way, tie_word_embeddings="tied" in way)
    train(trained)
    path = checkpoint_path(tmp_path / "stage" / "checkpoints", 6)
    held = torch.load(path, weights_only=True)  # refuses all that is not data
    names = {name for name, p in trained.student.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert set(held["state_dict"]) == {f"student.{name}" for name in names}
    assert names
    if "lora" in way:
        assert all("lora_" in name for name in names)
    shapes = [p.shape for p in trained.student.parameters() if p.requires_grad]
    moments = [state["exp_avg"].shape for state in held["optimizer_states"][0]["state"].values()]
    assert sorted(moments) == sorted(shapes)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(module: Any, train: Any, tmp_path: Path) -> None:
    for folder in ("straight", "resumed"):
        torch.manual_seed(3)
        train(module(), folder)
    newest = checkpoint_path(tmp_path / "resumed" / "checkpoints", 6)
    newest.write_bytes(newest.read_bytes()[:-100])
    warning, going_on = train(module(), "resumed")
    assert "warning" in warning
    assert f"{newest}: damaged" in warning
    assert going_on == "  resuming from step 3 of 6 (step=00000003.ckpt)"
    assert_same(left_by(tmp_path / "resumed"), left_by(tmp_path / "straight"))


def test_a_training_does_not_begin_anew_because_all_its_checkpoints_are_damaged(
    module: Any, train: Any, tmp_path: Path
) -> None:
    train(module())
    held = checkpoints(tmp_path / "stage" / "checkpoints")
    for file in held:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"damaged .* no other valid checkpoint; restore one, or .* --from ") as raised:
        train(module())
    assert str(raised.value).count("\n") == 0
    assert checkpoints(tmp_path / "stage" / "checkpoints") == held


def test_a_diverged_loss_is_one_line(module: Any, train: Any, tmp_path: Path) -> None:
    with pytest.raises(DistillError) as raised:
        train(module(lr=1e38), log_every_steps=1, checkpoint_every_steps=100)
    assert str(raised.value).count("\n") == 0
    assert "not finite in 5 steps in a row, the last at step 6" in str(raised.value)
    assert "lower optimizer.lr" in str(raised.value)


def test_diverged_weights_are_never_saved(module: Any, train: Any, tmp_path: Path) -> None:
    """Also between two rows of metrics, where the loss is not looked at."""
    broken = module()

    def spoil() -> None:
        with torch.no_grad():
            broken.student.model.norm.weight[0] = float("inf")

    with pytest.raises(DistillError, match=r"not finite at step 4.*run again"):
        train(broken, at={3 * BATCH + 2: spoil}, checkpoint_every_steps=1, log_every_steps=100, keep_checkpoints=1)
    (kept,) = checkpoints(tmp_path / "stage" / "checkpoints")
    assert kept.name == "step=00000003.ckpt"
    assert all(w.isfinite().all() for w in torch.load(kept, weights_only=True)["state_dict"].values())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("pytorch-lightning_version"),
        lambda state: state.pop("state_dict"),
        lambda state: state["state_dict"].popitem(),
        lambda state: state["state_dict"].update({"student.lm_head.weight": torch.zeros(7)}),
        lambda state: state.update(loops={}),
        lambda state: state.update(optimizer_states=[]),
        lambda state: state["optimizer_states"][0].update(param_groups=[]),
        lambda state: state.update(lr_schedulers=[None]),
        lambda state: state.pop("ranks"),
    ],
    ids=["version", "no weights", "a weight less", "shape", "loops", "optimizer", "groups", "schedule", "ranks"],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(change: Any, module: Any, train: Any, tmp_path: Path) -> None:
    """As another version of distill may have written it."""
    with pytest.raises(PulledPlug):
        train(module(), at={4 * BATCH: pull})
    path = checkpoint_path(tmp_path / "stage" / "checkpoints", 3)
    state = torch.load(path, weights_only=True)
    change(state)
    AtomicCheckpointIO().save_checkpoint(state, path)
    with pytest.raises(InputError) as refusal:
        train(module())
    assert str(refusal.value).startswith(f"{path}: does not fit this training (")
    assert str(refusal.value).endswith("or discard it with --from distill")
    assert "\n" not in str(refusal.value)
    assert path.exists()
