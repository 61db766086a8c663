from __future__ import annotations

import io
import itertools
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from rich.progress import Progress
from torch.utils._python_dispatch import TorchDispatchMode

from distill.training import record
from distill.training.flops import flops_per_token
from distill.training.gpu_peaks import peak_of
from distill.training.metrics import read_rows
from distill.training.show_progress import ShowProgress
from distill.training.step_end import StepEnd


class Steps(StepEnd):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        self.seen.append(step)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_step_end_comes_once_an_optimizer_step(accumulate: int, module: Any, loader: Any) -> None:
    steps = Steps()
    pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        accumulate_grad_batches=accumulate,
        callbacks=[steps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module(), loader(9))
    assert steps.seen == [1, 2, 3]


def test_a_log_file_gets_plain_lines(module: Any, train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(module())
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert line.startswith("  distill step 6/6  forward_kl ")
    for part in ("cross_entropy ", "kl ", "val ", " tokens/s", "  in "):
        assert part in line
    assert "\x1b" not in out + err
    assert "step" not in err


def test_a_line_says_a_number_once() -> None:
    def numbers(kl: float) -> str:
        return ShowProgress(SimpleNamespace(latest={"train/forward_kl": 0.5, "train/kl": kl}), "x")._numbers()  # type: ignore[arg-type]

    assert numbers(0.5) == "forward_kl 0.500"
    assert numbers(0.25) == "forward_kl 0.500  kl 0.250"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_terminal_gets_a_bar_that_is_taken_away(
    ends: str, module: Any, train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    started, stopped = [], []
    start, stop = Progress.start, Progress.stop
    monkeypatch.setattr(Progress, "start", lambda bar: (started.append(bar), start(bar)))
    monkeypatch.setattr(Progress, "stop", lambda bar: (stopped.append(bar), stop(bar)))

    def fail() -> None:
        raise RuntimeError("pulled the plug")

    if ends == "badly":
        with pytest.raises(RuntimeError, match="plug"):
            train(module(), at={8: fail})
    else:
        train(module())
        assert started[0].tasks[0].completed == 6
    assert len(started) == 1
    assert stopped == started
    lines = capsys.readouterr().out.splitlines()
    assert [line[:18] for line in lines] == (["  distill step 6/6"] if ends == "well" else [])


def test_the_flops_of_a_token_follow_the_formula(module: Any) -> None:
    distilled = module()
    student, teacher = distilled.student, distilled.teacher.model
    looked_up = [
        0 if m.config.tie_word_embeddings else m.get_input_embeddings().weight.numel() for m in (student, teacher)
    ]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (student, teacher)]
    assert flops_per_token(distilled) == 6 * (sizes[0] - looked_up[0]) + 2 * (sizes[1] - looked_up[1])


def test_rows_say_how_fast_and_how_long_the_data_let_wait(module: Any, train: Any, tmp_path: Path) -> None:
    train(module())
    rows = [row for row in read_rows(tmp_path / "stage") if "perf/tokens_per_s" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["perf/tokens_per_s"] > 0
        assert row["perf/model_tflops_per_s"] > 0
        assert 0 <= row["perf/data_wait_share"] < 1


def test_speed_counts_the_tokens_that_a_loss_was_taken_from(
    module: Any, train: Any, batch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks once a look, so that the time of a row is a whole number."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    train(module(), log_every_steps=1)
    rows = [row for row in read_rows(tmp_path / "stage") if "perf/tokens_per_s" in row]
    tokens = [int(batch(4 * step, 4)["mask"].sum()) for step in range(6)]
    seconds = [count / row["perf/tokens_per_s"] for row, count in zip(rows, tokens, strict=True)]
    assert len(set(tokens)) > 2
    assert all(each == pytest.approx(round(each)) for each in seconds)


class Reads(TorchDispatchMode):
    """Who of ours reads a number from the device, and so waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str] = Counter()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if call is torch.ops.aten._local_scalar_dense.default:
            ours = [frame.name for frame in traceback.extract_stack() if "/distill/training/" in frame.filename]
            self.by[[name for name in ours if not name.startswith("<")][-1]] += 1  # in no <dictcomp>
        return call(*args, **kwargs or {})


@pytest.mark.parametrize("way", ["full", "quant lora head"])
def test_only_a_due_row_reads_from_the_device(way: str, module: Any, train: Any) -> None:
    counts = {}
    for every in (1, 6):
        with Reads() as reads:
            train(module(way), f"every-{every}", log_every_steps=every, checkpoint_every_steps=100)
        counts[every] = reads.by
    names = 3  # losses, and KL at T = 1
    assert counts[1]["means_of"] - counts[6]["means_of"] == 5 * names
    differing = {name for name in counts[1] if counts[1][name] != counts[6][name]}
    assert differing == {"means_of", "counted_tokens"}
    counts[6].pop("_save")  # of the last step alone: a read a weight
    once_a_step = {name: count for name, count in counts[6].items() if count >= 12}  # two micro-batches each
    assert set(once_a_step) <= {"signal", "batch_losses"}, "transformers' look for packed rows, once a forward"


@pytest.mark.parametrize(
    ("name", "precision", "peak"), [("NVIDIA H200", "bf16-mixed", 989e12), ("NVIDIA L4", "bf16-true", 121e12)]
)
def test_the_peak_of_new_gpus_is_known(name: str, precision: str, peak: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    trainer: Any = SimpleNamespace(precision=precision)
    assert record._peak_flops(torch.device("cuda"), trainer) == peak
    assert record._peak_flops(torch.device("cpu"), trainer) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA RTX A1000", None), ("NVIDIA T400 4GB", None), ("Tesla T4", 65e12),
     ("NVIDIA GH200 480GB", 989e12), ("NVIDIA GeForce RTX 4090", 165e12)],
)  # fmt: skip
def test_the_peak_of_a_gpu_is_by_its_whole_name(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_the_peak_of_memory_is_that_of_the_stage(monkeypatch: Any) -> None:
    reset: list[Any] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(record, "flops_per_token", lambda module: 1.0)
    monkeypatch.setattr(record, "_peak_flops", lambda device, trainer: None)
    trainer: Any = SimpleNamespace(global_step=0)
    for device in ("cuda", "cpu"):
        module: Any = SimpleNamespace(device=torch.device(device), counted_tokens=lambda: 0)
        one = record.Record(None, "stage", record.TimedLoader([]), every=1, tokens_per_step=1.0)
        one.on_train_start(trainer, module)
    assert reset == [torch.device("cuda")]
