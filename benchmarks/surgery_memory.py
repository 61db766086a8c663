"""Peak memory of cutting a model shard by shard, against the bytes of the student that it makes.

    python benchmarks/surgery_memory.py [--hidden 1024] [--layers 24] [--out FILE.json]

A Llama of random weights is written to a temporary folder in shards, then cut in width to about half its parameters,
and the student written, in a process of its own; that process's peak resident memory is read from the system, less what
it held before the first weight was read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PEAK = "VmHWM:"


def make_teacher(folder: Path, hidden: int, layers: int) -> None:
    """A Llama of random bfloat16 weights, in shards of 200 MB."""
    import torch
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


def resident(key: str) -> int:
    """A figure of this process's memory, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def cut(teacher: Path, student: Path) -> None:
    """Cut and write the student; print the figures as JSON."""
    import torch

    from distill.models.layouts import layout_for
    from distill.models.load import load_config
    from distill.models.shards import carve_folder
    from distill.pruning.plan import plan
    from distill.pruning.random import random

    config, layout = load_config(str(teacher)), layout_for("llama")
    sizes = layout.sizes(config.to_dict())
    keep = {"hidden_size": sizes["hidden_channels"] * 3 // 4, "intermediate_size": sizes["mlp_neurons"] * 5 // 8}
    made = plan(random(sizes, 0), keep, layout, config.to_dict())
    before = resident("VmRSS:")
    model = carve_folder(str(teacher), made, layout, torch.bfloat16)
    carved = resident(PEAK) - before
    model.save_pretrained(student)
    figures = {
        "teacher_bytes": 2 * made.parameters_before,
        "student_bytes": 2 * made.parameters,
        "peak_bytes_cut": carved,
        "peak_bytes_cut_and_written": resident(PEAK) - before,
    }
    print(json.dumps(figures))


def main() -> None:
    """Make the teacher, cut it in a fresh process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cut", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cut:
        cut(*arguments.cut)
        return
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = Path(folder) / "teacher", Path(folder) / "student"
        make_teacher(teacher, arguments.hidden, arguments.layers)
        command = [sys.executable, __file__, "--cut", str(teacher), str(student)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = json.loads(output.splitlines()[-1])
    for name, value in figures.items():
        print(f"{name:28} {value / 1e6:10,.0f} MB   {value / figures['student_bytes']:5.2f} x the student")
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
