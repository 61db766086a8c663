"""A full training step, from the batch to the updated weights: `python -m benchmarks.whole_step`.

distill's trainer is compared with a plain PyTorch loop, the same loop with distill's chunked head, and TRL's two
trainers with a teacher (if ``trl`` is installed), on models with random weights. There are four tables:

    full        rows without padding: tokens per second, and model FLOPs (2 per weight of the teacher, 6 per weight of
                the student) as a fraction of the machine's measured GEMM rate
    memory      the same rows: peak of two steps relative to the loaded models, in one process per contender
    documents   documents with log-normal lengths: counted tokens per second, packed and padded
    overhead    time per step in addition to the arithmetic: models with the same number of layers, but tiny

The time is CPU time on a CPU (other processes have little influence) and wall time on a GPU. The contenders take turns,
and a figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import hardware, result
from benchmarks.step_contenders import CONTENDERS, Batch, Work
from distill.core.batch import causal_batch
from distill.data.loader import order_of
from distill.data.micro_batches import MicroBatches
from distill.data.packed_rows import PackedRows
from distill.data.packing import store_tokens
from distill.losses import ForwardKL
from distill.training.flops import flops_per_token
from distill.training.module import DistillationModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 32_000
TABLES = ("full", "memory", "documents", "overhead")
"""Prefixes of the names of the tables."""
SIZES = {
    "11M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "42M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "110M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "350M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
    "1.3B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
}
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
DOCUMENT_LENGTHS = (5.0, 1.0)
"""Mean and deviation of the log of a document's length: half are longer than 148 tokens, a sixth longer than 400."""


def model(size: dict[str, int], vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A Llama with random weights and tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, **size)
    return LlamaForCausalLM(config)


def work(teacher: dict[str, int], student: dict[str, int], batches: list[Batch], device: str, **more: int) -> Work:
    """A student, a frozen teacher and the batches."""
    asked = model(teacher, **more).eval().requires_grad_(False)
    if device == "cuda":
        asked = asked.to(device, torch.bfloat16)  # type: ignore[arg-type]
    return Work(model(student, **more), asked, batches, device)


def full_batches(steps: int, rows: int, length: int, vocabulary: int = VOCABULARY) -> list[Batch]:
    """Batches of random tokens without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (steps, rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[:, -1] = False
    return [causal_batch(some, mask) for some in ids]


def document_batches(packing: Any, steps: int, rows: int, length: int, *, bucketed: bool = True) -> list[Batch]:
    """The first batches of distill's order of training over 2,000 documents, with this packing."""
    random = np.random.default_rng(0)
    sizes = np.clip(np.exp(random.normal(*DOCUMENT_LENGTHS, 2000)).astype(int), 8, length)
    ids = random.integers(1, VOCABULARY, sizes.sum()).astype(np.uint16)
    ids[np.cumsum(sizes) - 1] = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        tokens = store_tokens(path, np.split(ids, np.cumsum(sizes)[:-1]), 0)
        blocks = PackedRows(tokens, length, packing=packing)
        order = order_of(blocks, 0, MicroBatches(rows))
        if not bucketed:
            order.lengths = None
        return [blocks[numbers] for numbers in islice(order, steps)]


def seconds_a_step(contender: Callable[[Work], None], given: Work) -> float:
    """Seconds per step, from the end of the first optimizer step to the end of the last."""
    stamps: list[float] = []

    def stamp(*_: Any) -> None:
        if given.device == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter() if given.device == "cuda" else time.process_time())

    hook = register_optimizer_step_post_hook(stamp)
    try:
        contender(given)
    finally:
        hook.remove()
    assert len(stamps) == len(given.batches), f"{len(stamps)} steps of {len(given.batches)}"
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def gemm_rate(device: str) -> float:
    """FLOPs per second of a large matrix product, in the dtype of the models."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if device == "cuda" else None) for _ in "ab")
    clock = time.perf_counter if device == "cuda" else time.process_time
    best = float("inf")
    for _ in range(4):
        started = clock()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    return 2 * size**3 / best


def interleaved(
    jobs: dict[str, tuple[Callable[[Work], None], Work]], rounds: int, device: str
) -> tuple[dict[str, list[float]], float]:
    """Seconds per step of every job in every round, and the median GEMM rate."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    rates = []
    for number in range(rounds):
        for name, (contender, given) in jobs.items():
            rates.append(gemm_rate(device))
            taken[name].append(seconds_a_step(contender, given))
            print(f"  round {number + 1}: {name}: {taken[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return taken, statistics.median(rates)


def available() -> dict[str, Callable[[Work], None]]:
    """The contenders that are installed."""
    return {name: run for name, run in CONTENDERS.items() if not name.startswith("TRL") or find_spec("trl")}


def full(pair: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second on rows without padding."""
    given = _pair(pair, full_batches(options.steps, options.rows, options.length), options.device)
    flops = flops_per_token(DistillationModule(given.student, [ForwardKL()], given.teacher))
    taken, rate = interleaved({name: (run, given) for name, run in available().items()}, options.rounds, options.device)
    tokens = options.rows * options.length
    plain = taken["plain PyTorch loop"]
    return [
        {
            "table": f"full rows, {pair.replace('-', ' -> ')}, {options.rows} x {options.length} tokens",
            "contender": name,
            "tokens_per_s": tokens / statistics.median(seconds),
            "against_plain": _ratio(plain, seconds),
            "share_of_gemm_rate": flops * tokens / statistics.median(seconds) / rate,
            "seconds": seconds,
            "gemm_gflops_per_s": rate / 1e9,
        }
        for name, seconds in taken.items()
    ]


def memory(pair: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of two steps on rows without padding, relative to the loaded models."""
    return [
        {
            "table": f"memory, {pair.replace('-', ' -> ')}, {options.rows} x {options.length} tokens",
            "contender": name,
            "peak_memory_mib": _peak_memory(name, pair, options),
        }
        for name in available()
    ]


def lengths(pair: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Counted tokens per second on documents of different lengths."""
    make = partial(document_batches, steps=options.steps, length=2 * options.length)
    rows = options.rows  # about two documents in each
    jobs = {
        f"distill, {packing}": ("distill", make(packing, rows=rows)) for packing in ("wrapped", "documents", "best_fit")
    }
    jobs["distill, padded in buckets"] = ("distill", make("padded", rows=2 * rows))
    at_random = make("padded", rows=2 * rows, bucketed=False)
    jobs["distill, padded at random"] = ("distill", at_random)
    jobs |= {f"{name}, padded at random": (name, at_random) for name in available() if name.startswith("TRL")}
    ready = {name: (CONTENDERS[who], _pair(pair, batches, options.device)) for name, (who, batches) in jobs.items()}
    taken, _ = interleaved(ready, options.rounds, options.device)
    title = f"documents of many lengths, {pair.replace('-', ' -> ')}, at most {2 * options.length} tokens per row"
    found = []
    for name, seconds in taken.items():
        # the first step is not timed, so its tokens are not counted
        counted = [batch["mask"] for batch in ready[name][1].batches[1:]]
        useful = sum(int(mask.sum()) for mask in counted)
        found.append(
            {
                "table": title,
                "contender": name,
                "useful_tokens_per_s": useful / len(counted) / statistics.median(seconds),
                "useful_share_of_positions": useful / sum(mask.numel() for mask in counted),
                "seconds": seconds,
            }
        )
    return found


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds per step in addition to the arithmetic, with tiny models of as many layers as 110M -> 42M."""
    tiny = [TINY | {"num_hidden_layers": SIZES[size]["num_hidden_layers"]} for size in ("110M", "42M")]
    given = work(tiny[0], tiny[1], full_batches(61, 1, 8, 64), options.device, vocabulary=64)
    taken, _ = interleaved(
        {name: (run, given) for name, run in available().items()}, 3 * options.rounds, options.device
    )
    base = taken["loop with distill's head"]
    return [
        {
            "table": "overhead, measured with a very small model of 8 layers",
            "contender": name,
            "ms_per_step": 1e3 * min(seconds),
            "ms_beside_the_bare_loop": 1e3 * (min(seconds) - min(base)),
            "seconds": seconds,
        }
        for name, seconds in taken.items()
    ]


def _measured_before(table: str) -> list[dict[str, Any]]:
    """Rows of a table that is not measured in this call."""
    file = result.FOLDER / "whole_step.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    return [row for row in rows if row["table"].startswith(table)]


def _pair(pair: str, batches: list[Batch], device: str) -> Work:
    teacher, student = pair.split("-")
    return work(SIZES[teacher], SIZES[student], batches, device)


def _ratio(plain: list[float], seconds: list[float]) -> float:
    """Speed relative to the plain loop, as the median over the rounds."""
    return statistics.median(p / s for p, s in zip(plain, seconds, strict=True))


def _peak_memory(name: str, pair: str, options: argparse.Namespace) -> float:
    """Peak memory in MiB relative to the loaded models, in its own process."""
    sizes = [f"--{key}={getattr(options, key)}" for key in ("rows", "length", "device", "threads")]
    command = [sys.executable, "-m", "benchmarks.whole_step", "--memory-of", name, "--pairs", pair, *sizes]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _memory_of(options: argparse.Namespace) -> float:
    given = _pair(options.pairs[0], full_batches(2, options.rows, options.length), options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        CONTENDERS[options.memory_of](given)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    small = TINY | {"num_hidden_layers": 1}
    # loads the libraries, whose memory is not counted
    CONTENDERS[options.memory_of](work(small, small, full_batches(1, 1, 8, 64), options.device, vocabulary=64))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # so that memory that is freed but still held does not hide a part of the peak
    before_kib = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    CONTENDERS[options.memory_of](given)
    marks = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return (int(marks["VmHWM"].split()[0]) - before_kib) / 1024


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", nargs="+", default=["42M-11M", "110M-42M"], help=f"pairs of {', '.join(SIZES)}")
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=TABLES, help="tables to measure; the others are kept"
    )
    parser.add_argument("--rows", type=int, default=4, help="rows per batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens per row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per turn; the first is not timed")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write results/whole_step.json."""
    options = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(_memory_of(options)))
        return
    rows: list[dict[str, Any]] = []
    for table in TABLES:
        if table not in options.tables:
            rows += _measured_before(table)
        elif table == "overhead":
            rows += overhead(options)
        elif table == "documents":
            rows += lengths(options.pairs[0], options)
        else:
            measure = full if table == "full" else memory
            rows += [row for pair in options.pairs for row in measure(pair, options)]
    for row in rows:
        print("  ".join(f"{key}={value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    notes = [] if find_spec("trl") else ["TRL was not installed (see benchmarks/README.md), so it was not measured."]
    file = result.write(
        "whole_step",
        command="python -m benchmarks.whole_step",
        hardware=hardware.describe(options.threads),
        versions=hardware.versions("trl"),
        rows=rows,
        notes=notes,
    )
    print(f"wrote {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
