"""The cost of scoring and surgery for a model of about 1B parameters: time relative to forward passes, peak memory.

A Llama with random weights is written in shards. Each criterion scores it on random tokens. The criteria and plain
passes of the kind that they need take turns in one process; the time is in CPU seconds, and the fastest round is
reported. Then the model is pruned in width to about half in a new process, whose peak memory is read from the system
(Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware, result, tables

FORWARD, BACKWARD = "forward through the body", "forward and backward through body and head"
PASSES: dict[str, str] = {
    "activation": FORWARD,
    "fluctuation": FORWARD,
    "wanda": FORWARD,
    "block_influence": FORWARD,
    "taylor": BACKWARD,
}
"""Criterion -> the pass that it needs. The backward pass is for activations only; the weights are frozen. Magnitude and
random read no data."""
PEAK, NOW = "VmHWM:", "VmRSS:"


def make_teacher(folder: Path, hidden: int, layers: int) -> None:
    """Write a Llama with random bfloat16 weights, in shards of 200 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")
    torch.set_default_dtype(torch.float32)


def resident(key: str) -> int:
    """A memory figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def measured(work: Callable[[], Any]) -> tuple[float, int]:
    """CPU seconds, and peak memory relative to the memory before, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # so that memory freed by the previous job is not reused
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started = resident(NOW), time.process_time()
    work()
    return time.process_time() - started, max(0, resident(PEAK) - before)


def score(teacher: Path, sequences: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """One row per criterion: its time relative to the passes that it needs, and its peak memory."""
    from distill.core.batch import causal_batch
    from distill.models.layouts import layout_for
    from distill.models.load import load_model
    from distill.pruning import CRITERIA

    model, layout = load_model(str(teacher), dtype="float32").eval(), layout_for("llama")
    ids = torch.randint(0, 32000, (sequences, length), generator=torch.Generator().manual_seed(0))
    batches = [causal_batch(part, torch.ones_like(part, dtype=torch.bool)) for part in ids.split(1)]

    def forward() -> None:
        with torch.no_grad():
            for given in ids.split(1):
                model.model(input_ids=given, use_cache=False)

    def backward() -> None:
        for given in ids.split(1):
            embedded = model.get_input_embeddings()(given).requires_grad_()
            model(inputs_embeds=embedded, labels=given, use_cache=False).loss.backward()

    model.requires_grad_(False)
    criteria = {kind: CRITERIA[kind]() for kind in PASSES}
    jobs: dict[str, Callable[[], Any]] = {
        FORWARD: forward,
        BACKWARD: backward,
        **{kind: lambda c=criterion: c.score(model, layout, batches) for kind, criterion in criteria.items()},
    }
    for name in (FORWARD, BACKWARD):
        jobs[name]()  # memory that the first pass allocates permanently is not counted
    return score_rows([{name: measured(job) for name, job in jobs.items()} for _ in range(rounds)])


def score_rows(rounds: list[dict[str, tuple[float, int]]]) -> list[dict[str, Any]]:
    """Rows of the result, from (seconds, bytes) of each job in each round; ratios are computed within a round."""
    rows = []
    for kind, needed in PASSES.items():
        ratios = [one[kind][0] / one[needed][0] for one in rounds]
        rows.append(
            {
                "table": "scoring",
                "criterion": kind,
                "pass": needed,
                "seconds": min(one[kind][0] for one in rounds),
                "pass_seconds": min(one[needed][0] for one in rounds),
                "over_passes": min(ratios),
                "each_round": ratios,
                "peak_mb": min(one[kind][1] for one in rounds) / 1e6,
                "pass_peak_mb": min(one[needed][1] for one in rounds) / 1e6,
            }
        )
    return rows


def cut(teacher: Path, student: Path) -> None:
    """Prune and write the student; print the figures as JSON."""
    from distill.models.layouts import layout_for
    from distill.models.load import load_config
    from distill.models.weight_files import prune_folder
    from distill.pruning.keep import KeepSpec
    from distill.pruning.plan import plan
    from distill.pruning.random import random

    config, layout = load_config(str(teacher)), layout_for("llama")
    sizes = layout.sizes(config.to_dict())
    keep = KeepSpec(hidden_size=sizes["hidden_channels"] * 3 // 4, intermediate_size=sizes["mlp_neurons"] * 5 // 8)
    made = plan(random(sizes, 0), keep, layout, config.to_dict())
    before, started = resident(NOW), time.process_time()
    model = prune_folder(str(teacher), made, layout, torch.bfloat16)
    seconds, carved = time.process_time() - started, resident(PEAK) - before
    model.save_pretrained(student)
    figures = {
        "teacher_mb": 2 * made.parameters_before / 1e6,
        "student_mb": 2 * made.parameters / 1e6,
        "seconds": seconds,
        "peak_over_student": carved / (2 * made.parameters),
        "peak_with_writing_over_student": (resident(PEAK) - before) / (2 * made.parameters),
    }
    print(json.dumps(figures))


def surgery(teacher: Path, student: Path) -> Iterator[dict[str, Any]]:
    """The row of :func:`cut`, which runs in a new process."""
    command = [sys.executable, "-m", "benchmarks.scoring", "--cut", str(teacher), str(student)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    yield {"table": "surgery", **json.loads(output.splitlines()[-1])}


def main() -> None:
    """Make the teacher, prune it, score it, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cut", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cut:
        cut(*options.cut)
        return
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = Path(folder) / "teacher", Path(folder) / "student"
        make_teacher(teacher, options.hidden, options.layers)
        rows = list(surgery(teacher, student))
        rows += score(teacher, options.sequences, options.length, options.rounds)
    parameters = round(rows[0]["teacher_mb"] / 2 * 1e6)
    result.write(
        "scoring",
        command="python -m benchmarks.scoring",
        hardware=hardware.describe(options.threads),
        versions=hardware.versions(),
        rows=rows,
        notes=[
            f"A Llama of {parameters:,} random parameters; scored in float32 on {options.sequences} sequences of "
            f"{options.length} tokens, one sequence at a time, {options.rounds} rounds; pruned in bfloat16.",
        ],
    )
    print(tables.table([row for row in rows if row["table"] == "scoring"]))
    print(tables.table([row for row in rows if row["table"] == "surgery"]))


if __name__ == "__main__":
    main()
