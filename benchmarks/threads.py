"""Training with different numbers of CPU threads, on an idle and on a busy machine: `python -m benchmarks.threads`.

The quickstart's distill stage is run from the command line with PyTorch's default threads, with distill's settings and
with one thread; then training steps of small models are timed with one thread and with all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import hardware, result
from distill.core.threads import NUMBER, OURS, WAITING
from distill.training.metrics import read_rows

CHOICES: dict[str, dict[str, str]] = {
    "PyTorch's default": {"GOMP_SPINCOUNT": "300000"},  # the default of GNU's OpenMP library
    "distill's": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
MACHINES = {"alone": 0, "beside two busy programs": 2, "beside six": 6}
TOKENS_PER_STEP = 8 * 256
SMALL = ((16, 32), (32, 256), (64, 256), (128, 256), (64, 1024), (128, 512), (128, 1024), (128, 2048))
"""(hidden size, tokens per step) of the small models."""


def main() -> None:
    """Run both measurements and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in each of which every choice is measured once")
    parser.add_argument("--seconds", type=float, default=15.0, help="smallest training time per measurement")
    parser.add_argument("--preferred", action="store_true", help="run with priority over other processes; needs root")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        print(json.dumps([_small(*size, options.seconds / 3) for size in SMALL]))
        return
    if options.preferred and (group := Path("/proc/self/autogroup")).exists():
        group.write_text("-20")
    with tempfile.TemporaryDirectory() as place:
        measured = [
            (machine, choice, _tokens_per_s(Path(place), CHOICES[choice], MACHINES[machine], options))
            for _ in range(options.rounds)
            for machine in MACHINES
            for choice in CHOICES
        ]
    environment = _environment({"OMP_WAIT_POLICY": "PASSIVE"})
    command = [sys.executable, "-m", "benchmarks.threads", "--small", "--seconds", str(options.seconds)]
    small = subprocess.run(_first(command, options), env=environment, capture_output=True, text=True, check=True)
    result.write(
        "threads",
        command="python -m benchmarks.threads" + " --preferred" * options.preferred,
        hardware=hardware.describe(),
        versions=hardware.versions(),
        rows=[*_rows(measured), *json.loads(small.stdout.splitlines()[-1])],
        notes=NOTES + PREFERRED * options.preferred,
    )


NOTES = [
    "The quickstart's distill stage (2,048 tokens per step) by `distill run`, from its third step on. The other "
    "programs are Python loops that are started then. Every choice is measured once per round, and the median over the "
    "rounds is reported; ratios are computed within a round, then their median.",
    "A step of a small model is forward, backward, clipping and AdamW of a Llama with a vocabulary of 2,048. Both "
    "numbers of threads take turns, idle threads sleep, and the median over all steps is reported.",
]
PREFERRED = [
    "The machine had other load. The measurements without busy programs, and the small models, ran with real-time "
    "priority (SCHED_RR); those with busy programs ran with them in one process group of high priority (autogroup -20)."
]


def _rows(measured: list[tuple[str, str, float]]) -> Iterator[dict[str, Any]]:
    """One row per machine and choice; ratios are computed within a round."""
    first = next(iter(CHOICES))
    for machine in MACHINES:
        each = {choice: [value for m, c, value in measured if (m, c) == (machine, choice)] for choice in CHOICES}
        for choice, values in each.items():
            yield {
                "table": "quickstart",
                "machine": machine,
                "threads": choice,
                "tokens_per_s": round(statistics.median(values)),
                "to_default": statistics.median(v / d for v, d in zip(values, each[first], strict=True)),
                "each_round": [round(value) for value in values],
            }


def _environment(more: dict[str, str]) -> dict[str, str]:
    """The environment of a user who has set only ``more``."""
    return {name: v for name, v in os.environ.items() if name not in (*NUMBER, *WAITING, OURS)} | more


def _first(command: list[str], options: argparse.Namespace) -> list[str]:
    """The command with real-time priority, if the options ask for it."""
    return ["chrt", "--rr", "1", *command] if options.preferred else command


def _tokens_per_s(place: Path, choice: dict[str, str], num_busy: int, options: argparse.Namespace) -> float:
    """Tokens per second of the distill stage, over at least ``seconds`` and two steps."""
    run, recipe = place / "run", ["run", "recipes/quickstart.yaml", "--set", "logging.wandb=disabled"]
    command = [sys.executable, "-m", "distill", *recipe, "--run-dir", str(run)]
    if not run.exists():
        subprocess.run([*command, "--only", "prune"], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(run / "distill", ignore_errors=True)
    settings = ["stages.distill.num_tokens=1e9", "stages.distill.validate_every_steps=1000000"]
    more = ["--only", "distill", *(w for s in [*settings, "compute.log_every_steps=1"] for w in ("--set", s))]
    command = [*command, *more] if num_busy else _first([*command, *more], options)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=_environment(choice), **quiet) as training:
        try:
            _until(3, run / "distill", training)
            with _busy(num_busy):
                start = _until(len(read_rows(run / "distill")) + 1, run / "distill", training)
                began, took, steps = time.monotonic(), 0.0, 0
                while took < options.seconds or steps < 2:
                    steps = _until(start + steps + 1, run / "distill", training) - start
                    took = time.monotonic() - began
        finally:
            training.kill()
    print(choice, num_busy, round(steps * TOKENS_PER_STEP / took), flush=True)
    return steps * TOKENS_PER_STEP / took


def _until(step: int, stage: Path, training: subprocess.Popen[bytes]) -> int:
    """Wait for a step; returns the last completed step."""
    while (made := len(read_rows(stage))) < step:
        if training.poll() is not None:
            raise RuntimeError(f"the run has ended with exit code {training.returncode}")
        time.sleep(0.005)
    return made


@contextmanager
def _busy(number: int) -> Iterator[None]:
    """Run ``number`` programs that use a CPU all the time, within the ``with`` block."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def _small(hidden: int, tokens: int, seconds: float) -> dict[str, Any]:
    """Time of a training step of a small model with one thread and with all threads, in turn."""
    heads = max(2, hidden // 32)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(config.vocab_size, (max(1, tokens // 256), min(tokens, 256)))  # [rows, tokens of a row]
    all_threads = torch.get_num_threads()
    times: dict[int, list[float]] = {1: [], all_threads: []}
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(times[1]) < 6:
        for number, taken in times.items():
            torch.set_num_threads(number)
            began = time.perf_counter()
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            taken.append(time.perf_counter() - began)
    torch.set_num_threads(all_threads)
    one, every = (1e3 * statistics.median(taken[1:]) for taken in times.values())  # the first step warms up
    return {
        "table": "small",
        "hidden_size": hidden,
        "tokens": tokens,
        "numbers": hidden * tokens,
        "one_thread_ms": one,
        "all_threads_ms": every,
        "speed_up": one / every,
    }


if __name__ == "__main__":
    main()
