"""Speed of writing text and conversations to token files: one and two processes, compared with an earlier version.

`python -m benchmarks.tokenizing TOKENIZER --corpus BOOKS --chat ROWS` takes the folder of a model, whose tokenizer and
chat template are used, and files with text and conversations. In each round, every choice is measured once, in its own
process; ratios are computed within a round. Measured is what a run does before it trains: reading, split, tokenizer and
writing. The earlier version knows text alone, so conversations are compared with one process of this one.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import hardware, result
from distill.data.base import digest, normalised
from distill.data.encoder import backend_of
from distill.data.jsonl import Jsonl
from distill.data.tokenizer import load_tokenizer
from distill.data.word_cache import WordCache

BASE = "88e858c"
"""The earlier version: the last one that tokenized by a single process."""
MANY_WORDS = 60
"""Number of documents that are encoded at once when the parts are measured."""

CHILD = """
import json, resource, sys, time
from pathlib import Path
from distill.data.spec import DataSpec
from distill.data.tokenizer import load_tokenizer
folder, out, source = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
tokenizer = load_tokenizer(folder)
more = {"max_dropped": 1.0} if source["kind"] == "chat" else {}
data = DataSpec.model_validate({"train": source, "sequence_length": 512, **more})
%s
def cpu(who): return sum(resource.getrusage(who)[:2])
start, begun = time.perf_counter(), cpu(resource.RUSAGE_SELF)
tokens = write(out / "train-0.bin")
wall, own = time.perf_counter() - start, cpu(resource.RUSAGE_SELF) - begun
others = cpu(resource.RUSAGE_CHILDREN)
print(json.dumps({"tokens": tokens.num_tokens, "wall": wall, "own": own, "others": others}))
"""
BEFORE = """
from distill.data.encoder import Encoder
from distill.data.packing import write_tokens
from distill.data.split import Split
encoder = Encoder(tokenizer)
def write(path): return write_tokens(path, Split(data).training(), encoder, len(tokenizer))
"""
NOW = """
from distill.core.world import SINGLE_PROCESS
from distill.data import corpus
from distill.data.mixture_split import texts_of
from distill.data.tokenizing import tokens_of
encoder, (text,) = corpus._encoder(data, tokenizer), texts_of(data)
def write(path): return tokens_of(path, "train", text, encoder, len(tokenizer), None, None, SINGLE_PROCESS)
"""


def main() -> None:
    """Measure the choices and the parts of the work, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path, help="folder of a chat model")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train.jsonl.gz, a row {text: ...}")
    parser.add_argument("--chat", type=Path, required=True, help="file of conversations, .jsonl or .jsonl.gz")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    book = options.corpus / "train.jsonl.gz"
    sources = {
        "text": {"kind": "jsonl", "path": str(book)},
        "conversations": {"kind": "chat", "path": str(options.chat)},
    }
    with tempfile.TemporaryDirectory() as place:
        rows = [row for what, source in sources.items() for row in _compared(what, source, Path(place), options)]
    result.write(
        "tokenizing",
        command="python -m benchmarks.tokenizing TOKENIZER --corpus BOOKS --chat ROWS",
        hardware=hardware.describe(num_threads=2),
        versions=hardware.versions("tokenizers", "numpy"),
        rows=[*rows, *_parts(options.tokenizer, book)],
        notes=NOTES,
    )


NOTES = [
    "The versions split text differently, so the numbers of tokens differ. CPU seconds are summed over all processes. "
    "On a machine with other load, as here, compare tokens per CPU second, because the wall time depends on the load.",
    "The bound is the speed on idle cores: the CPU time of all processes divided by their number, or that of the "
    "process that reads, splits and writes, if it is larger. This process also encodes the first 2 MB alone.",
]


def _compared(what: str, source: dict[str, str], place: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one text: all versions and numbers of processes."""
    here, one = Path(__file__).parents[1], {"TOKENIZERS_PARALLELISM": "false"}
    choices = {
        ("now, one process", 1): (here, NOW, one),
        ("now, two processes and the one that reads", 2): (here, NOW, {"RAYON_NUM_THREADS": "2"}),
    }
    if what == "text":
        choices = {(f"{BASE}, one process", 1): (_checkout(BASE, place / what), BEFORE, one), **choices}
    found: dict[tuple[str, int], list[dict[str, float]]] = {choice: [] for choice in choices}
    for number in range(options.rounds):
        for choice, (code, child, environment) in choices.items():
            out = place / f"{what}-{number}-{len(found[choice])}-{choice[0].replace(' ', '_')}"
            out.mkdir()
            command = [sys.executable, "-P", "-c", CHILD % child, str(options.tokenizer), str(out), json.dumps(source)]
            done = subprocess.run(
                command,
                env=os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"} | environment,
                capture_output=True,
                text=True,
                check=True,
            )
            found[choice].append(json.loads(done.stdout.splitlines()[-1]))
            print(what, *choice, found[choice][-1], flush=True)
    before = found[next(iter(choices))]
    for (name, processes), measured in found.items():
        bounds = [max(one["own"], (one["own"] + one["others"]) / processes) for one in measured]
        yield {
            "table": "versions",
            "text": what,
            "version": name,
            "tokens": int(measured[0]["tokens"]),
            "wall_s": statistics.median(one["wall"] for one in measured),
            "cpu_s": statistics.median(one["own"] + one["others"] for one in measured),
            "tokens_per_cpu_s": statistics.median(map(_per_cpu, measured)),
            "per_core": statistics.median(_per_cpu(a) / _per_cpu(b) for a, b in zip(measured, before, strict=True)),
            "speed_up": statistics.median(_per_s(a) / _per_s(b) for a, b in zip(measured, before, strict=True)),
            "speed_up_bound": statistics.median(
                a["tokens"] / bound / _per_cpu(b) for a, bound, b in zip(measured, bounds, before, strict=True)
            ),
        }


def _per_cpu(one: dict[str, float]) -> float:
    return one["tokens"] / (one["own"] + one["others"])


def _per_s(one: dict[str, float]) -> float:
    return one["tokens"] / one["wall"]


def _checkout(revision: str, folder: Path) -> Path:
    """Check out the package at a revision."""
    archive = subprocess.run(["git", "archive", revision, "distill"], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def _parts(folder: Path, book: Path) -> Iterator[dict[str, Any]]:
    """Rows of the parts of the work on text, in CPU seconds of one thread per million tokens."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend = backend_of(load_tokenizer(folder))
    backend.encode_special_tokens = True
    words = WordCache.of(backend)
    assert words is not None
    spent: dict[str, float] = {}
    start = time.process_time()
    texts = [item.text for item in Jsonl(path=str(book)).documents()]
    spent["reading: gzip, JSON"] = time.process_time() - start
    start = time.process_time()
    for text in texts:
        digest(normalised(text))
    spent["split: the text normalised, and hashed"] = time.process_time() - start
    batches = [texts[at : at + MANY_WORDS] for at in range(0, len(texts), MANY_WORDS)]
    start = time.process_time()
    whole = [len(made.ids) for batch in batches for made in backend.encode_batch_fast(batch, add_special_tokens=False)]
    spent["tokenizer, on whole texts as before"] = time.process_time() - start
    start = time.process_time()
    looked_up = [len(ids) for batch in batches for ids in words.encode(batch)]
    spent["tokenizer, word by word, none known at first"] = time.process_time() - start
    start = time.process_time()
    for batch in batches:
        words.encode(batch)
    spent["tokenizer, word by word, all of them known"] = time.process_time() - start
    assert looked_up == whole
    for part, seconds in spent.items():
        yield {"table": "parts", "part": part, "cpu_s_per_million_tokens": seconds / sum(whole) * 1e6}


if __name__ == "__main__":
    main()
