"""Time and memory of the loss only: from hidden states and both heads to the gradients of hidden states and head.

    python -m benchmarks.loss_alone [--device cuda] [--tokens 1024 8192] [--vocabulary 32000 128256]

The limit is the time of the matrix products: the student's logits, the teacher's logits, and the student's two
gradients; the fastest of three chunk sizes is used. The implementations take turns, and a figure is the median over the
rounds. On a CPU it is in CPU seconds, so that other load of the machine has little influence; on a GPU it is measured
with CUDA events. Peak memory is measured in a separate process, relative to the memory before the step: the resident
set on a CPU, torch's allocator on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import describe, versions
from benchmarks.loss_alone_contenders import Case, Contender, contenders, distill
from benchmarks.result import write

Row = dict[str, Any]
WIDTHS = {32000: (512, 1024), 128256: (256, 512)}
"""Vocabulary -> hidden sizes of student and teacher, so small that the logits dominate as they do in small models."""
MEMORY = {32000: (2048, 256, 512), 128256: (1024, 256, 512)}
"""Vocabulary -> number of tokens and hidden sizes, for the measurement of peak memory."""
KINDS = ("forward_kl", "jensen_shannon")


def main() -> None:
    """Measure, print, and write results/loss_alone.json."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.peak is not None:
        print(json.dumps(_peak(**json.loads(arguments.peak))))
        return
    rows: list[Row] = []
    notes: list[str] = []
    for vocabulary in arguments.vocabulary:
        rows += _memory(arguments, vocabulary)
        for tokens in arguments.tokens:
            rows += _times(arguments, vocabulary, tokens, notes)
            _write(arguments, rows, notes)
    for vocabulary in arguments.vocabulary:
        rows += _own_times(arguments, vocabulary)
        _write(arguments, rows, notes)


def _write(arguments: argparse.Namespace, rows: list[Row], notes: list[str]) -> None:
    """Write the rows measured so far."""
    options = (
        f"--tokens {' '.join(map(str, arguments.tokens))} --repeats {arguments.repeats} --device {arguments.device}"
    )
    write(
        "loss_alone" if arguments.device == "cpu" else "loss_alone_cuda",
        command=f"python -m benchmarks.loss_alone {options} --threads {arguments.threads}",
        hardware=describe(arguments.threads),
        versions=versions("trl", "liger-kernel", "torchtune"),
        rows=sorted(rows, key=lambda row: row["table"], reverse=True),
        notes=sorted(set(notes)),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="tokens per step, for the times")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compiled", action="store_true", help="also Liger compiled, which takes a minute to warm up")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def _where(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}


def _times(arguments: argparse.Namespace, vocabulary: int, tokens: int, notes: list[str]) -> list[Row]:
    """Times of distill and of the peers, for both losses."""
    widths = WIDTHS[vocabulary]
    case = Case.make(tokens, vocabulary, *widths, **_where(arguments))
    runs: dict[tuple[str, str], Callable[[], None]] = {}
    for kind in KINDS:
        expected = _gradient(case, distill, kind)
        for name, contender in contenders(arguments.device, arguments.compiled).items():
            try:
                cosine = torch.cosine_similarity(_gradient(case, contender, kind), expected, dim=0).item()
            except Exception as error:
                if not isinstance(error, NotImplementedError):
                    notes.append(f"{name} did not run: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
                continue
            if cosine < 0.999:
                notes.append(f"{name}, {kind}: its gradient differs from that of distill (cosine {cosine:.4f})")
            runs[kind, name] = lambda contender=contender, kind=kind: _step(case, contender, kind)
    medians, limit = _medians(case, runs, arguments)
    rows = []
    for (kind, name), seconds in medians.items():
        row = {"table": "times", "vocabulary": vocabulary, "tokens": tokens, "widths": f"{widths[0]} / {widths[1]}"}
        rows.append(row | {"loss": kind, "implementation": name, **_figures(seconds, limit)})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _own_times(arguments: argparse.Namespace, vocabulary: int) -> list[Row]:
    """Times of all losses of distill that read logits."""
    from distill.losses import LOSSES

    tokens = min(arguments.tokens)
    case = Case.make(tokens, vocabulary, *WIDTHS[vocabulary], **_where(arguments))
    kinds = [kind for kind, member in LOSSES.items() if hasattr(member, "value_and_gradient")]
    runs = {kind: lambda kind=kind: _step(case, distill, kind) for kind in kinds}
    medians, limit = _medians(case, runs, arguments)
    rows = []
    for kind, seconds in medians.items():
        row = {"table": "losses", "vocabulary": vocabulary, "tokens": tokens, "loss": kind}
        rows.append(row | _figures(seconds, limit))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _figures(seconds: float, limit: float) -> Row:
    return {"ms": round(1e3 * seconds, 1), "times_limit": round(seconds / limit, 3), "limit_ms": round(1e3 * limit, 1)}


def _medians(
    case: Case, runs: dict[Any, Callable[[], None]], arguments: argparse.Namespace
) -> tuple[dict[Any, float], float]:
    """Median seconds of each function, and of the limit; all take turns."""
    limits = {("limit", size): _products(case, size) for size in sorted({256, 512, len(case.hidden)})}
    turns: dict[Any, list[float]] = {name: [] for name in (*limits, *runs)}
    for turn in range(arguments.repeats + 1):
        for name, run in (limits | runs).items():
            seconds = _seconds(run, arguments.device)
            if turn:  # the first turn is a warm-up
                turns[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in turns.items()}
    return {name: medians[name] for name in runs}, min(medians[name] for name in limits)


def _seconds(run: Callable[[], None], device: str) -> float:
    gc.collect()
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _products(case: Case, size: int) -> Callable[[], None]:
    """The four matrix products, in chunks of ``size`` tokens, into memory that is already allocated."""
    hidden, weight, other = case.hidden.detach(), case.head.weight.detach(), case.teacher_head.weight
    logits, theirs = (hidden.new_empty(size, len(weight)) for _ in range(2))
    of_hidden, of_weight = torch.empty_like(hidden[:size]), torch.zeros_like(weight)

    def products() -> None:
        for start in range(0, len(hidden), size):
            rows, teacher_rows = hidden[start : start + size], case.teacher_hidden[start : start + size]
            ours = torch.mm(rows, weight.T, out=logits[: len(rows)])
            torch.mm(teacher_rows, other.T, out=theirs[: len(rows)])
            torch.mm(ours, weight, out=of_hidden[: len(rows)])
            of_weight.addmm_(ours.T, rows)

    return products


def _step(case: Case, contender: Contender, kind: str) -> None:
    case.hidden.grad = case.head.weight.grad = None
    contender(case, kind).backward()


def _gradient(case: Case, contender: Contender, kind: str) -> torch.Tensor:
    _step(case, contender, kind)
    assert case.hidden.grad is not None
    return case.hidden.grad.flatten().float()


def _memory(arguments: argparse.Namespace, vocabulary: int) -> list[Row]:
    """Peak memory of each implementation, each in its own process."""
    tokens, *widths = MEMORY[vocabulary]
    rows: list[Row] = []
    for kind in KINDS:
        found: dict[str, float] = {}
        for name in contenders(arguments.device, arguments.compiled):
            what = {"name": name, "kind": kind, "shape": [tokens, vocabulary, *widths], "compiled": arguments.compiled}
            options = ["--threads", str(arguments.threads), "--device", arguments.device, "--dtype", arguments.dtype]
            what |= {"device": arguments.device, "dtype": arguments.dtype}
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "benchmarks.loss_alone",
                *options,
                "--peak",
                json.dumps(what),
            ]
            child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
            if child.returncode == 0:
                found[name] = json.loads(child.stdout.splitlines()[-1])
        gradients = 4 * widths[0] * (tokens + vocabulary) / 2**20
        for name, peak in found.items():
            row = {
                "table": "memory",
                "vocabulary": vocabulary,
                "tokens": tokens,
                "widths": f"{widths[0]} / {widths[1]}",
            }
            row |= {"loss": kind, "implementation": name, "peak_mib": round(peak), "gradients_mib": round(gradients)}
            rows.append(row | {"plain_over_this": round(found["plain PyTorch"] / peak, 1)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _peak(name: str, kind: str, shape: list[int], compiled: bool, device: str, dtype: str) -> float:
    """Peak memory of a step in MiB, relative to the memory before it."""
    contender = contenders(device, compiled)[name]
    where = {"device": device, "dtype": getattr(torch, dtype)}
    _step(Case.make(16, 256, 16, 16, **where), contender, kind)  # loads libraries, threads and kernels
    case = Case.make(*shape, **where)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(case, contender, kind)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before = _resident("VmRSS")
    _step(case, contender, kind)
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    """A memory figure of this process in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


if __name__ == "__main__":
    main()
