"""Pruning: the loss of quality directly after pruning and after the same short distillation, by criterion and shape.

The teacher of ``books`` is pruned to three quarters, a half and a quarter of its parameters outside the embeddings, in
width and in depth, by each criterion. All pruned models are evaluated, and then trained on the same tokens. Controls:
randomly chosen units, the same architecture with random weights, and two rounds of pruning instead of one. A search
with the same parameter budget is compared with the architecture that keeps the same fraction of each axis. Models that
``pruning_peers`` has pruned in WORK are evaluated and trained in the same way.

Learning rates are chosen on the validation books with a third of the budget, for each fraction that is kept and each
kind of start (pruned, or random weights with either loss). The most informative models are trained first, with all
seeds, and then the other criteria. After an interruption, the tables contain all finished cells.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import books, hardware, pruning_peers, result, tables
from benchmarks.losses import Budget, next_rate
from benchmarks.matrix import Cell, Matrix, Unfinished
from benchmarks.pruning_cuts import (
    EVEN,
    SEARCH,
    SEARCHES,
    SHAPES,
    SOLVED,
    START,
    cuts,
    others,
    search,
    solved,
    stage_name,
    telling,
)
from distill.core.errors import DistillError

BATCH_SIZE = 8
FIGURES = ("perplexity", "kl_to_teacher", "top1_agreement")


def training(stage: Mapping[str, Any], start: str, num_tokens: int, lr: float) -> dict[str, Any]:
    """A training stage that starts from ``start``, with its budget."""
    num_steps = max(1, num_tokens // (BATCH_SIZE * books.SEQUENCE_LENGTH))
    model = "model" if stage["kind"] == "finetune" else "student"
    budget = {"num_steps": num_steps, "batch_size": BATCH_SIZE, "validate_every_steps": num_steps}
    return {**stage, model: start, **budget, "optimizer": {"lr": lr}}


KD = {"kind": "distill", "losses": ["forward_kl"]}
CONTROLS: dict[str, dict[str, Any]] = {
    "random weights, distilled": {**KD, "weights": "random"},
    "random weights, cross-entropy": {"kind": "finetune", "weights": "random"},
}


class Pruning:
    """The cells of the benchmark, and the rows of the finished cells."""

    def __init__(self, corpus: Path, work: Path, budget: Budget, *, only_finished: bool = False) -> None:
        teacher = books.teacher(corpus, work)
        self.budget = budget
        self.choosing, self.reporting = (
            Matrix(work / "pruning", teacher, books.data(corpus, split), only_finished=only_finished)
            for split in ("valid", "test")
        )
        self.peers = pruning_peers.found(work)
        self.cut: dict[int, dict[str, dict[str, Any]]] = {}
        self.folders: dict[tuple[int, str], str] = {}
        self.searched: dict[int, dict[str, list[dict[str, Any]]]] = {}
        self.rates: dict[tuple[int, str], dict[float, float]] = {}
        self.trained: dict[tuple[int, str], list[dict[str, Any]]] = {}

    def cut_all(self, share: int) -> None:
        """Prune to this fraction in every way, with distill and the peers, and evaluate the results."""
        found = self._cut(share, f"cut-{share}", cuts(share))
        found |= self._cut(share, f"solved-{share}", {SOLVED: solved(share)})
        self.cut[share] = found
        folders = {peer.name: str(peer.folder) for peer in self.peers if peer.share == share and peer.folder}
        if folders:
            stages = {"evaluate": {"models": list(folders.values()), "speed": None}}
            figures = self.reporting.run(Cell(f"peers-{share}", stages))
            found |= {name: figures[folder] for name, folder in folders.items()}
            self.folders |= {(share, name): folder for name, folder in folders.items()}

    def search(self, share: int) -> None:
        """Search architectures with as many parameters as START, and prune to the uniform one for comparison."""
        most = self.cut[share][START]["non_embedding_parameters"]
        training = {"num_tokens": self.budget.search_tokens, "batch_size": BATCH_SIZE}
        rate = self.rate(share, None)
        for name, folder in zip(SEARCHES, (f"found-{share}", f"found-{share}-taylor"), strict=True):
            stage = search(name, most, {**training, "optimizer": {"lr": rate}})
            self.cut[share] |= self._cut(share, folder, {name: stage})
            told = self.reporting.folder / folder / stage_name(name) / "search.json"
            ranking = json.loads(told.read_text(encoding="utf-8"))["ranking"]
            self.searched.setdefault(share, {})[name] = ranking
        even = next(row["keep"] for row in self.searched[share][SEARCH] if row["uniform"])
        self.cut[share] |= self._cut(share, f"even-{share}", {EVEN: {"kind": "prune", "keep": even}})

    def _cut(self, share: int, name: str, wanted: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        stages = {stage_name(cut): stage for cut, stage in wanted.items()}
        figures = self.reporting.run(
            Cell(name, {**stages, "evaluate": {"models": ["teacher", *stages], "speed": None}})
        )
        for cut in wanted:
            self.folders[share, cut] = str(self.reporting.folder / name / stage_name(cut) / "model")
        return {cut: figures[stage_name(cut)] for cut in wanted} | {"teacher": figures["teacher"]}

    def rate(self, share: int, control: str | None) -> float:
        """The learning rate for pruned models of this fraction, or for a control; it is searched if it is not known."""
        found = self.rates.setdefault((share, control or "pruned"), {})
        while (lr := next_rate(found)) is not None:
            stage = CONTROLS[control] if control else KD
            stages = {"student": training(stage, self.folders[share, START], self.budget.search_tokens, lr)}
            cell = Cell(f"search-{share}/{stage_name(control or 'pruned')}/lr-{lr:g}", stages | _evaluate())
            found[lr] = self.choosing.run(cell)["student"]["perplexity"]
        return min(found, key=found.__getitem__)

    def train(self, share: int, name: str, starts: list[str], seed: int) -> None:
        """Train a pruned model. With several starts, train, prune the result and train again, in several rounds."""
        tokens, lr = self.budget.num_tokens // len(starts), self.rate(share, None)
        if len(starts) == 1:
            stages = {"student": training(KD, self.folders[share, starts[0]], tokens, lr)}
        else:
            shares = list(SHAPES)
            before = shares[shares.index(share) - 1]
            first = training(KD, self.folders[before, starts[0]], tokens, lr)
            again = {**cuts(share)[starts[1]], "model": "first"}
            stages = {"first": first, "again": again, "student": training(KD, "again", tokens, lr)}
        self._keep(share, name, stages, seed)

    def control(self, share: int, name: str, seed: int) -> None:
        """Train the same architecture from random weights."""
        lr = self.rate(share, name)
        stages = {"student": training(CONTROLS[name], self.folders[share, START], self.budget.num_tokens, lr)}
        self._keep(share, name, stages, seed)

    def _keep(self, share: int, name: str, stages: dict[str, Any], seed: int) -> None:
        cell = Cell(f"trained-{share}/{stage_name(name)}/seed-{seed}", stages | _evaluate(), seed)
        with suppress(Unfinished):
            student = self.reporting.run(cell)["student"]
            self.trained.setdefault((share, name), []).append(student)

    def run(self) -> Iterator[list[dict[str, Any]]]:
        """Run all unfinished cells; yields the rows of all finished cells after each of them."""
        for share in SHAPES:
            self.cut_all(share)
            yield self.rows()
        if self.budget.num_seeds:
            for share in SHAPES:
                self.search(share)
                yield self.rows()
        for tell in (telling, others):
            for seed in range(self.budget.num_seeds):
                for share in SHAPES:
                    for name, starts in tell(share, seed).items():
                        self.train(share, name, starts, seed)
                        yield self.rows()
                    if tell is telling:
                        yield from self._compared(share, seed)

    def _compared(self, share: int, seed: int) -> Iterator[list[dict[str, Any]]]:
        """The controls and the peers of a share."""
        for control in CONTROLS:
            self.control(share, control, seed)
            yield self.rows()
        for peer in self.peers:
            if peer.share == share and peer.folder:
                self.train(share, peer.name, [peer.name], seed)
                yield self.rows()

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the result."""
        return [
            *cut_rows(self.cut),
            *trained_rows(self.trained),
            *searched_rows(self.searched),
            *peer_rows(self.peers),
            *rate_rows(self.rates),
        ]


def _evaluate() -> dict[str, Any]:
    return {"evaluate": {"models": ["student"], "speed": None}}


def cut_rows(cut: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Every cut as it is, the best of its share first; those by chance as one row with their spread."""
    for share, figures in cut.items():
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for name, one in figures.items():
            groups.setdefault(name.rstrip("0123456789 ") if " random " in name else name, []).append(one)
        found = [(name, _figures(of)) for name, of in groups.items() if name != "teacher"]
        for name, row in [("teacher", _figures(groups["teacher"])), *sorted(found, key=_by_perplexity)]:
            yield {"table": "cut", "kept": share, "cut": name, **row}


def trained_rows(trained: Mapping[tuple[int, str], list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Every way to a trained student, the best of its share first."""
    found = [(share, name, _figures(runs)) for (share, name), runs in trained.items()]
    for share, name, row in sorted(found, key=lambda one: (-one[0], _by_perplexity(one[1:]))):
        yield {"table": "trained", "kept": share, "start": name, **row, "seeds": len(trained[share, name])}


def searched_rows(searched: Mapping[int, Mapping[str, list[dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    """What each search chose, and the even architecture beside it."""
    for share, rankings in searched.items():
        even = next(row for row in rankings[SEARCH] if row["uniform"])
        for name, row in [*((name, ranking[0]) for name, ranking in rankings.items()), (EVEN, even)]:
            sizes = ", ".join(f"{key} {size}" for key, size in row["keep"].items())
            trained = row["trained"] and row["trained"]["kl"]
            figures = {"kl_when_cut": row["cut"]["kl"], "kl_after_training": trained}
            yield {"table": "searched", "kept": share, "by": name, "sizes": sizes, **figures}


def peer_rows(peers: list[pruning_peers.Peer]) -> Iterator[dict[str, Any]]:
    """The result or the last line of output of each peer."""
    for peer in peers:
        yield {"table": "peers", "kept": peer.share, "peer": peer.name, "outcome": peer.outcome}


def rate_rows(rates: Mapping[tuple[int, str], Mapping[float, float]]) -> Iterator[dict[str, Any]]:
    """Validation perplexity for each learning rate that was tried."""
    tried = sorted({lr for found in rates.values() for lr in found})
    for (share, start), found in rates.items():
        yield {"table": "search", "kept": share, "start": start, **{f"{lr:g}": found.get(lr) for lr in tried}}


def _figures(runs: list[Any]) -> dict[str, Any]:
    size = {"non_embedding_parameters": runs[0]["non_embedding_parameters"]}
    return size | {key: result.spread([run[key] for run in runs]) for key in FIGURES}


def _by_perplexity(named: tuple[str, dict[str, Any]]) -> float:
    return named[1]["perplexity"]["mean"]


def main() -> None:
    """Measure, and write the result after each cell."""
    parser = books.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=300_000, help="tokens per final run (default: %(default)s)")
    parser.add_argument("--search-tokens", type=int, default=100_000, help="tokens per run of the search (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="final runs of each start; 0: only prune (%(default)s)")
    parser.add_argument("--only-finished", action="store_true", help="run nothing; only write the finished cells")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budget = Budget(options.tokens, options.search_tokens, options.seeds)
    found: list[dict[str, Any]] = []
    for found in Pruning(options.corpus, options.work, budget, only_finished=options.only_finished).run():
        result.write(
            "pruning",
            command="python -m benchmarks.pruning --corpus BOOKS --work WORK "
            f"--tokens {options.tokens} --search-tokens {options.search_tokens} --seeds {options.seeds}",
            hardware=hardware.describe(options.threads),
            versions=hardware.versions(),
            rows=found,
            notes=[
                f"Each final run was trained on {budget.num_tokens:,} tokens, {BATCH_SIZE} sequences of "
                f"{books.SEQUENCE_LENGTH} per step; the runs of the search on {budget.search_tokens:,}."
            ]
            if budget.num_seeds
            else [],
        )
    print(tables.table(found, where={"table": "cut"}))
    if budget.num_seeds:
        print(tables.table(found, where={"table": "trained"}))


if __name__ == "__main__":
    try:
        main()
    except DistillError as error:
        sys.exit(f"error: {error}")
