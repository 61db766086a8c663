"""Checks that a change does not change any bit of the results: `python -m benchmarks.identity --base REVISION`.

The recipes of ``identity_recipes`` are run with the code of a git revision and with the working tree, one after the
other, each in its own process on one thread. All metrics and evaluation results, and a hash of all weights, must be
equal. There is one line per recipe, and exit code 1 if anything differs. ``--record`` writes the results of the working
tree to ``tests/identity.json``, with which the tests compare.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.identity_recipes import MODELS, RECIPES, as_yaml, write_text_files

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests" / "identity.json"
Figures = dict[str, float | str]
"""Name of a figure -> its value; for a file of weights, the value is a hash."""

_MEASURED = ("perf/", "memory/", "seconds", "per_s")
"""Parts of the names of figures that depend on time and memory and are not compared."""
_SERVER = """
import os, sys
import datasets, peft, pytorch_lightning, torch, transformers
from distill.cli import main
for line in sys.stdin:
    recipe, run_dir, log = line.rstrip("\\n").split("\\t")
    if (child := os.fork()) == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv = ["distill", "run", recipe, "--run-dir", run_dir]
        main()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs recipes in forked processes, so that packages are imported only once per tree."""


class Tree:
    """A checkout of distill that runs recipes.

    Args:
        code: root of the checkout.
        place: folder for its runs.
    """

    def __init__(self, code: Path, place: Path):
        self.place = place
        place.mkdir()
        environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVER],  # -P: do not add the current folder to sys.path
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=code,
        )

    def run(self, name: str, texts: Path) -> Figures | str:
        """Run one of :data:`RECIPES`; returns its figures, or one line with the reason why it failed."""
        recipe, run, log = (self.place / f"{name}{end}" for end in (".yaml", "", ".log"))
        recipe.write_text(as_yaml(name, texts, self.place / MODELS), encoding="utf-8")
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{recipe}\t{run}\t{log}\n")
        self._server.stdin.flush()
        code = self._server.stdout.readline().strip() or "none, the process is gone"
        if code == "0":
            return figures(run)
        said = log.read_text().splitlines() if log.exists() else []
        return f"exit code {code}: {said[-1] if said else ''}"

    def close(self) -> None:
        """End the process."""
        self._server.communicate()


def figures(run: Path) -> Figures:
    """All results in a run folder: metrics, figures of stages, hashes and norms of weights."""
    found: Figures = {}
    for done in sorted(run.glob("*/DONE")):
        stage = done.parent
        metrics = stage / "metrics.jsonl"
        for row in map(json.loads, metrics.read_text().splitlines() if metrics.exists() else ()):
            found |= _flat(row, f"{stage.name} step {row['step']}")
        found |= _flat(json.loads(done.read_text())["figures"], stage.name)
        if (rows := stage / "rows.json").exists():
            # a model is named by its stage or by its folder, and the folder is different in each run
            named = {Path(row["name"]).parent.name or row["name"]: row for row in json.loads(rows.read_text())}
            found |= _flat(named, stage.name)
        for file in sorted(stage.rglob("*.safetensors")):
            digest, norm = _weights(file)
            place = file.relative_to(run)
            found |= {f"{place}": digest, f"{place} norm": norm}
    return found


def _flat(value: Any, name: str) -> Figures:
    """The numbers in nested dicts, by path."""
    if isinstance(value, dict):
        return {key: number for part in value for key, number in _flat(value[part], f"{name} {part}").items()}
    is_number = isinstance(value, int | float) and not any(part in name for part in _MEASURED)
    return {name: value} if is_number else {}


def _weights(file: Path) -> tuple[str, float]:
    """SHA-256 of the names, shapes, dtypes and bytes of a file's tensors, and the norm of its float tensors."""
    digest, square = sha256(), 0.0
    with safe_open(file, "pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            square += tensor.double().square().sum().item() if tensor.is_floating_point() else 0.0
    return digest.hexdigest(), math.sqrt(square)


def differences(expected: Figures, found: Figures, tolerance: float | None = None) -> list[str]:
    """The figures that differ, one line per figure, with the largest relative difference first.

    Args:
        expected: figures of one side.
        found: figures of the other side.
        tolerance: largest relative difference of numbers that is accepted; hashes are ignored then. None: no bit may
            differ.
    """
    lines = [(math.inf, f"{name} is on one side only") for name in sorted(expected.keys() ^ found.keys())]
    for name in expected.keys() & found.keys():
        old, new = expected[name], found[name]
        if isinstance(old, str) or isinstance(new, str):
            if tolerance is None and old != new:
                lines.append((0.0, f"{name} differs"))
            continue
        relative = abs(new - old) / max(abs(old), 1e-30) if math.isfinite(old) and math.isfinite(new) else math.inf
        if relative > (tolerance or 0.0) and repr(old) != repr(new):
            lines.append((relative, f"{name}: {old!r} -> {new!r} (relative {relative:.1e})"))
    return [line for _, line in sorted(lines, key=lambda pair: (-pair[0], pair[1]))]


def arithmetic() -> dict[str, str]:
    """Everything on which the last bits depend: versions, instruction set, and a hash of some computed results.

    Libraries choose their kernels by the processor, so equal versions do not guarantee equal bits. The hash covers the
    kernels that a training calls, with sizes of a training.
    """
    random = torch.Generator().manual_seed(0)
    digest = sha256()
    for rows, inner, columns in ((96, 32, 64), (50, 24, 300), (96, 300, 16), (7, 64, 32)):
        left, right = torch.randn(rows, inner, generator=random), torch.randn(inner, columns, generator=random)
        for dtype in (torch.float32, torch.bfloat16):
            product = (left.to(dtype) @ right.to(dtype)).float()
            for value in (product, product.log_softmax(-1), product.exp(), torch.sigmoid(product), product.rsqrt()):
                digest.update(value.nan_to_num().contiguous().numpy().tobytes())
    query = torch.randn(2, 4, 24, 8, generator=random)
    attended = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    digest.update(attended.contiguous().numpy().tobytes())
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "probe": digest.hexdigest(),
    }


@contextmanager
def _checkout(revision: str) -> Iterator[Path]:
    """Check out a revision within the ``with`` block."""
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "base"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(place), revision], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(place)], check=True)


def compare(base: str, names: Sequence[str]) -> bool:
    """Run the recipes with both versions and print one line for each; returns whether all results are equal."""
    same = True
    with _checkout(base) as code, tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_text_files(place)
        trees = Tree(code, place / "base"), Tree(ROOT, place / "changed")
        try:
            for name in dict.fromkeys([MODELS, *names]):
                before, after = (tree.run(name, place) for tree in trees)
                if isinstance(before, str) or isinstance(after, str):
                    sides = (("base", before), ("changed", after))
                    lines = [f"{side}: {found}" for side, found in sides if isinstance(found, str)]
                else:
                    lines = differences(before, after)
                same = same and not lines
                more = f" ({len(lines) - 1} more)" if len(lines) > 1 else ""
                print(f"{name:<16} {lines[0] + more if lines else f'same, {len(after)} figures'}", flush=True)
        finally:
            for tree in trees:
                tree.close()
    return same


def record(file: Path = RECORD) -> None:
    """Write the results of the working tree, for the tests.

    Raises:
        RuntimeError: a recipe failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_text_files(place)
        tree = Tree(ROOT, place / "changed")
        try:
            found = {name: tree.run(name, place) for name in RECIPES}
        finally:
            tree.close()
    for name, values in found.items():
        if isinstance(values, str):
            raise RuntimeError(f"{name}: {values}")
    data = {"arithmetic": arithmetic(), "figures": found}
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Compare or record, depending on the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--base", metavar="REVISION", help="revision to compare the working tree with")
    what.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="unset: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.record:
        record()
    elif not compare(options.base, options.recipes):
        sys.exit(1)


if __name__ == "__main__":
    main()
