"""Signals a run at random moments until it has been signalled often enough, and compares what comes out in the end with
a run that nothing happened to: exit codes, and every file of weights to the last bit."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import yaml

from distill.core.listener import DEBOUNCE_S, KINDS
from tests.faults.chaos import as_on_a_terminal
from tests.faults.workers import Workers

WEIGHTS = ("*/model/*.safetensors", "*/*/model.safetensors", "*/*/*.gguf", "*/*/*.onnx", "data/**/shard-*.safetensors")
IMPORTS = ("torch.onnx", "torch.export", "onnxscript", "onnxruntime", "matplotlib.figure", "gguf")
"""What :func:`many_stages_recipe` needs besides the usual; for :class:`~tests.faults.workers.Workers`."""
PYTHON_S = 1.0
"""Within these seconds a command may still be Python that starts, which any signal ends as it ends any program."""
OFTEN = 12
"""Signals come at any moment of this part of what an undisturbed run takes."""
TWICE, GROUP = 0.1, 0.1
"""Shares of the signals that are followed by a second one, and by the same one at once."""


class Attempt(Protocol):
    """One attempt at a run."""

    def send(self, number: signal.Signals, rank: int) -> None:
        """Send a process the signal."""

    def running(self) -> bool:
        """Whether any process runs."""

    def wait(self, seconds: float) -> list[int]:
        """Exit codes of all processes."""

    def said(self) -> str:
        """All that they have said."""


class Command:
    """An attempt by the command line as a user types it, with all of Python's imports.

    Args:
        arguments: of ``distill``.
        log: folder for what it says.
    """

    def __init__(self, arguments: Sequence[str], log: Path):
        log.mkdir(parents=True, exist_ok=True)
        self._log = log / "command.log"
        with self._log.open("a") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "distill", *arguments],
                stdout=out, stderr=out, start_new_session=True, preexec_fn=as_on_a_terminal,
            )  # fmt: skip

    def send(self, number: signal.Signals, rank: int) -> None:
        """To the process, or with rank 1 to the whole group, as a scheduler or a terminal does."""
        (os.killpg if rank else os.kill)(self._process.pid, number)

    def running(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def wait(self, seconds: float) -> list[int]:
        """Its exit code.

        Raises:
            TimeoutError: with what it has said.
        """
        try:
            return [self._process.wait(seconds)]
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise TimeoutError(f"no end in {seconds:.0f} s:\n{self.said()}") from None

    def said(self) -> str:
        """All that it has said."""
        return self._log.read_text(errors="replace")


@dataclass
class Tally:
    """What a campaign has done and found.

    Attributes:
        signals: which, how often.
        stages: what was being done, how often.
        codes: of all attempts that were signalled, how often.
        wrong: each end that was not as promised, in words.
        finished: runs that came to their end.
        exact: of these, the ones with the undisturbed run's weights, to the last bit.
        seconds: from each signal to the end of all processes.
    """

    signals: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    finished: int = 0
    exact: int = 0
    seconds: list[float] = field(default_factory=list)


@dataclass
class SignalCampaign:
    """Attempts at one recipe, each signalled at some moment and gone on with by the same command.

    Attributes:
        workers: start the attempts; None types the command.
        recipe: file of the recipe.
        folder: where runs go.
        size: processes of an attempt.
        options: further arguments of the command line.
        seed: decides when, what and whom.
        limit_s: of one attempt.
    """

    workers: Workers | None
    recipe: Path
    folder: Path
    size: int = 1
    options: Sequence[str] = ()
    seed: int = 0
    limit_s: float = 1800.0

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._expected: dict[str, str] = {}
        self._took_s = 0.0
        self._num_started = 0

    def run(self, num_signals: int) -> Tally:
        """One run, signalled until it is finished or so many signals were sent; then it is finished undisturbed.

        Raises:
            RuntimeError: an attempt that nobody signalled failed.
        """
        if not self._expected:
            started = time.monotonic()
            self._expected = self._finish(self.folder / "undisturbed")
            self._took_s = time.monotonic() - started
        run, tally = self.folder / "disturbed", Tally()
        shutil.rmtree(run, ignore_errors=True)
        until_s, before = self._took_s / OFTEN, -1
        while not self._is_done(run) and tally.signals.total() < num_signals:
            # a stage that begins anew each time must be given the time that it takes
            until_s = self._took_s / OFTEN if self._num_done(run) > before else min(2 * until_s, 2 * self._took_s)
            before = self._num_done(run)
            self._attempt(run, self._chance.uniform(0, until_s), tally)
        weights = self._finish(run)
        tally.finished += 1
        tally.exact += weights == self._expected
        if different := sorted(file for file in self._expected if weights.get(file) != self._expected[file]):
            tally.wrong.append(f"not the undisturbed weights: {', '.join(different)}")
        return tally

    def _attempt(self, run: Path, after_s: float, tally: Tally) -> None:
        """Start, signal after so many seconds, and look at the exit code."""
        attempt = self._start(run)
        began = time.monotonic()
        while attempt.running() and time.monotonic() < began + after_s:
            time.sleep(0.01)
        if not attempt.running():
            return self._unsignalled(attempt)
        number = self._chance.choice([signal.Signals(number) for number in KINDS])
        ranks = self._chance.choice([[rank] for rank in range(self.size)] + [[*range(self.size)]] * (self.size > 1))
        stages = re.findall(r"^\[\d+/\d+\] (\w+)", attempt.said(), re.M)
        stage = stages[-1] if stages else "before the stages"
        how, sent = self._chance.random(), time.monotonic()
        self._send(attempt, number, ranks)
        if how < TWICE:
            time.sleep(DEBOUNCE_S + 0.5)
            self._send(attempt, number, ranks)
        elif how < TWICE + GROUP:
            self._send(attempt, number, ranks)
        told = number.name + (
            " sent a second time later" if how < TWICE else " sent twice within 1 s" if how < TWICE + GROUP else ""
        )
        try:
            codes = attempt.wait(self.limit_s)
        except TimeoutError as error:
            codes = []
            tally.wrong.append(f"{told} to {ranks}: {error}")
        tally.seconds.append(round(time.monotonic() - sent, 2))
        tally.signals[told] += 1
        tally.stages[stage] += 1
        tally.codes[" ".join(map(str, sorted(set(codes))))] += 1
        # all may be done before the signal is heard
        right = {KINDS[number].exit_code, *([0] if self._is_done(run) and stage == self._last else [])}
        if not codes or (not right.issuperset(codes) and not self._was_python(codes, sent - began)):
            tally.wrong.append(f"{told} to {ranks} in {stage}: exit codes {codes}\n{attempt.said()[-3000:]}")

    def _send(self, attempt: Attempt, number: signal.Signals, ranks: Sequence[int]) -> None:
        for rank in ranks:
            try:
                attempt.send(number, rank)
            except ProcessLookupError:
                continue

    def _was_python(self, codes: Sequence[int], after_s: float) -> bool:
        """Whether the signal came before the command had taken over the signals."""
        return self.workers is None and after_s < PYTHON_S and all(code < 0 for code in codes)

    def _unsignalled(self, attempt: Attempt) -> None:
        if any(codes := attempt.wait(self.limit_s)):
            raise RuntimeError(f"exit codes {codes}\n{attempt.said()}")

    def _finish(self, run: Path) -> dict[str, str]:
        """Run undisturbed to the end; file of weights -> its hash."""
        self._unsignalled(self._start(run))
        files = {file for pattern in WEIGHTS for file in run.glob(pattern)}
        return {str(file.relative_to(run)): sha256(file.read_bytes()).hexdigest() for file in files}

    def _start(self, run: Path) -> Attempt:
        arguments = ["run", str(self.recipe), "--run-dir", str(run), *self.options]
        self._num_started += 1
        log = run.with_name(f"{run.name}-{self._num_started}.log")  # a new one shows when the process has come so far
        if self.workers is None:
            return Command(arguments, log)
        world = self.workers.start(arguments, size=self.size, log=log)
        while world.running() and not all(file.exists() for file in world.logs):
            time.sleep(0.001)  # a process that has not come so far is not Python's distill yet
        return world

    def _is_done(self, run: Path) -> bool:
        return (run / self._last / "DONE").exists()

    def _num_done(self, run: Path) -> int:
        return len(list(run.glob("*/DONE"))) + len(list(run.glob("*/checkpoints/*.ckpt")))

    @cached_property
    def _last(self) -> str:
        return str([*yaml.safe_load(self.recipe.read_text())["stages"]][-1])


def many_stages_recipe(text: Path) -> str:
    """A recipe of nine kinds of stage, a minute long, with dropout and W&B offline.

    Args:
        text: a JSONL file.
    """
    shape = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 260,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    train = {"num_steps": 8, "batch_size": 2, "validate_every_steps": 4}
    short = {"num_candidates": 2, "num_steps": 2, "batch_size": 2}
    axes = {"axes": ["intermediate_size"], "multiple_of": {"intermediate_size": 8}}
    budget = {"non_embedding_parameters": "80%", "tolerance": 0.3}
    own = {"share": 0.5, "prompt_tokens": 4, "max_new_tokens": 8}
    taught = {"student": "prune", "kind": "distill"} | train
    recipe = {
        "name": "many-stages",
        "data": {
            "train": {"kind": "jsonl", "path": str(text)},
            "sequence_length": 16,
            "validation_tokens": 60,
            "calibration_sequences": 8,
            "tokenizer": {"vocab_size": 260},
        },
        "stages": {
            "base": {"kind": "finetune", "model": {"config": shape | heads | {"attention_dropout": 0.2}}} | train,
            "prune": {"model": "base", "search": {"budget": budget, "num_measured": 2, "train": short} | axes},
            "cache": {"kind": "cache_teacher", "teacher": "base"},
            "distill": taught | {"teacher": "cache"},
            "own": taught | {"teacher": "base", "on_policy": own, "losses": ["forward_kl"]},
            "sparsify": {"model": "distill"},
            "quantize": {"student": "distill", "teacher": "base", "quantizer": "int8_channel"} | train,
            "evaluate": {
                "teacher": "base",
                "models": ["base", "distill", "quantize"],
                "speed": {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1, "rounds": 1},
            },
            "huggingface": {"kind": "export", "model": "quantize"},
            "gguf": {"kind": "export", "model": "distill", "target": "gguf"},
            "onnx": {"kind": "export", "model": "distill", "target": "onnx"},
            "report": {"prompts": ["row 1"], "models": ["base", "distill"], "new_tokens": 4},
        },
        "compute": {"accelerator": "cpu", "micro_batch_size": 1, "checkpoint_every_steps": 2, "silence_s": 60},
        "logging": {"wandb": "offline"},
    }
    return yaml.safe_dump(recipe, sort_keys=False)


def kinds_of_stages() -> set[str]:
    """The kinds of stage of :func:`many_stages_recipe`."""
    stages = yaml.safe_load(many_stages_recipe(Path("text.jsonl")))["stages"]
    return {stage.get("kind", name) for name, stage in stages.items()}
