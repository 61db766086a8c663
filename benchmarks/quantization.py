"""Quantization: one student with every quantizer, rounded and trained, with and without a teacher.

The student is pruned from the teacher of ``books`` to half of its parameters, and distilled. It is then quantized with
each quantizer in three ways: rounded in every way that the quantizer supports; trained with fake quantization by
cross-entropy or by distillation from the teacher (starting at the nearest codes, or at those of gptq); and trained by
distillation from its unquantized self. The control is the student in full precision, trained with the same loss on the
same number of additional tokens. The gap that training closes is measured between the control and the rounded control,
so that the effect of the additional training is not counted. (Distilled from itself, the student does not change, so it
is its own control.)

Learning rates, and whether the scale is learned, are chosen on the validation books with half of the budget, for int4,
int3, int2 and ternary; int8 uses the choice for int4, and binary that for ternary.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import books, hardware, quantization_peers, result, tables
from benchmarks.losses import next_rate
from benchmarks.matrix import Cell, Matrix
from benchmarks.quantization_grids import (
    BATCH_SIZE,
    FIRST_RATES,
    GRIDS,
    KEEP,
    METHODS,
    NUM_TOKENS,
    SEARCH_TOKENS,
    SEARCHED,
    best,
    longer,
    rounded,
    scales,
    stage_name,
    trained,
)
from distill.core.errors import DistillError
from distill.reporting.tradeoff import gap_closed

FIGURES = ("perplexity", "kl_to_student", "kl_to_teacher", "top1_agreement")
FULL = "full precision"
LEAST_GAP = 1e-3
"""In nats. For a smaller gap no recovered fraction is reported, because it would mostly be noise."""
CALIBRATION_SEQUENCES = 32
"""Number of calibration sequences of 256 tokens: about fifty tokens per input channel of the layers that gptq
rounds."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """Numbers of tokens of the student, the final runs and the learning rate search, and number of seeds."""

    student_tokens: int
    num_tokens: int
    search_tokens: int
    num_seeds: int


def budgeted(stage: Mapping[str, Any], num_tokens: int, lr: float) -> dict[str, Any]:
    """A training stage with its budget."""
    num_steps = max(1, num_tokens // (BATCH_SIZE * books.SEQUENCE_LENGTH))
    budget = {"num_steps": num_steps, "batch_size": BATCH_SIZE, "validate_every_steps": num_steps}
    return {**stage, **budget, "optimizer": {"lr": lr}}


def rounding(ways: Mapping[tuple[str, str], Mapping[str, Any]], model: str) -> dict[str, dict[str, Any]]:
    """A stage for each way of rounding to a grid without training."""
    start = {"kind": "quantize", "student": model, "num_tokens": 0, "embeddings": "keep"}  # grids of layers alone
    return {stage_name(*key): {**start, **keys} for key, keys in ways.items()}


class Quantization:
    """The cells of the benchmark, and the rows of the finished cells."""

    def __init__(
        self, corpus: Path, work: Path, budget: Budget, grids: Sequence[str] = (), methods: Sequence[str] = ()
    ) -> None:
        teacher = books.teacher(corpus, work)
        self.budget, self.work = budget, work
        self.grids, self.methods = grids or list(GRIDS), methods or list(METHODS)
        calibration = {"calibration_sequences": CALIBRATION_SEQUENCES}
        self.choosing, self.reporting = (
            Matrix(work / "quantization", teacher, books.data(corpus, split) | calibration)
            for split in ("valid", "test")
        )
        self.models: dict[str, Figures] = {}
        self.rounded: dict[tuple[str, str], Figures] = {}
        self.controls: dict[str, list[dict[str, Figures]]] = {}
        self.trained: dict[tuple[str, str], list[Figures]] = {}
        self.rates: dict[tuple[str, str | None, str], dict[float, float]] = {}

    @property
    def start(self) -> str:
        """Folder of the unquantized student."""
        return str(self.reporting.folder / "start" / "student" / "model")

    def make_student(self) -> None:
        """Prune and distil the student."""
        num_steps = self.budget.student_tokens // (8 * books.SEQUENCE_LENGTH)
        student = {"kind": "distill", "student": "pruned", "num_steps": num_steps, "batch_size": 8}
        stages = {
            "pruned": {"kind": "prune", "keep": KEEP},
            "student": {**student, "optimizer": {"lr": 2e-3}, "validate_every_steps": num_steps},
            "evaluate": {"models": ["teacher", "pruned", "student"], "speed": None},
        }
        self.models = self.reporting.run(Cell("start", stages))

    def round_all(self) -> None:
        """Round the student to every grid in every way."""
        ways = {(grid, way): keys for grid in GRIDS for way, keys in rounded(GRIDS[grid]).items()}
        stages = rounding(ways, self.start)
        figures = self.reporting.run(Cell("rounded", stages | self._measured(*stages)))
        self.rounded = {key: _joined(figures, stage_name(*key)) for key in ways}

    def _measured(self, *models: str) -> dict[str, Any]:
        """Evaluation stages that compare models with the teacher and with the unquantized student."""
        measured = {"models": list(models), "speed": None}
        return {"evaluate": measured, "to_student": {"kind": "evaluate", **measured, "teacher": self.start}}

    def search(self, grid: str, scale: str | None, method: str) -> dict[float, float]:
        """Learning rate -> perplexity on the validation books; unknown perplexities are measured."""
        found = self.rates.setdefault((grid, scale, method), {})
        while (lr := next_rate(found, FIRST_RATES)) is not None:
            control = grid == FULL
            stage = longer(method, self.start) if control else trained(GRIDS[grid], scale, method, self.start)
            stages = {"student": budgeted(stage, self.budget.search_tokens, lr)}
            measured = {"evaluate": {"models": ["student"], "speed": None}}
            name = stage_name(f"{grid}-{scale}" if scale else grid, method)
            figures = self.choosing.run(Cell(f"search-{self.budget.search_tokens}/{name}/lr-{lr:g}", stages | measured))
            found[lr] = figures["student"]["perplexity"]
        return found

    def choice(self, grid: str, method: str) -> tuple[str | None, float]:
        """Source of the scale of a grid's training, and its learning rate."""
        among, place = (scales(grid, method), GRIDS[grid].searched) if grid in GRIDS else ((None,), grid)
        like = SEARCHED.get(method, method)
        found = {(scale, lr): p for scale in among for lr, p in self.search(place, scale, like).items()}
        return min(found, key=found.__getitem__)

    def control(self, method: str, seed: int) -> None:
        """Train the student further in full precision, and round it: to the nearest codes and in the best way."""
        _, lr = self.choice(FULL, method)
        stages = {"longer": budgeted(longer(method, self.start), self.budget.num_tokens, lr)}
        ways = {(g, w): keys for g in self.grids for w, keys in rounded(GRIDS[g]).items() if w in ("nearest", best(g))}
        stages |= rounding(ways, "longer")
        stages |= self._measured("longer")
        stages["evaluate"] = {**stages["evaluate"], "models": ["longer", *(stage_name(*key) for key in ways)]}
        name = f"control-{self.budget.num_tokens}/{stage_name(FULL, method)}/seed-{seed}"
        figures = self.reporting.run(Cell(name, stages, seed))
        measured = {FULL: _joined(figures, "longer")}
        measured |= {f"{g}, {w}": _joined(figures, stage_name(g, w)) for g, w in ways}
        self.controls.setdefault(method, []).append(measured)

    def train(self, grid: str, method: str, seed: int) -> None:
        """Train the student on a grid."""
        scale, lr = self.choice(grid, method)
        stages = {"student": budgeted(trained(GRIDS[grid], scale, method, self.start), self.budget.num_tokens, lr)}
        name = f"trained-{self.budget.num_tokens}/{stage_name(grid, method)}/seed-{seed}"
        cell = Cell(name, stages | self._measured("student"), seed)
        self.trained.setdefault((grid, method), []).append(_joined(self.reporting.run(cell), "student"))

    def run(self) -> Iterator[list[dict[str, Any]]]:
        """Run all unfinished cells; yields the rows of all finished cells after each of them."""
        self.make_student()
        self.round_all()
        yield self.rows()
        for seed in range(self.budget.num_seeds):
            for method in self.methods:
                if method not in SEARCHED:
                    self.control(method, seed)
                    yield self.rows()
                for grid in (grid for grid in self.grids if scales(grid, method)):
                    self.train(grid, method, seed)
                    yield self.rows()

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the result."""
        return [
            *({"table": "start", "model": name, **_figures([row])} for name, row in self.models.items()),
            *rounded_rows(self.rounded),
            *control_rows(self.controls),
            *trained_rows(self.trained, self._controls_of, self.choice),
            *peer_rows(quantization_peers.found(self.work, self.budget.num_tokens)),
            *rate_rows(self.rates),
        ]

    def _controls_of(self, method: str, seed: int) -> dict[str, Figures]:
        """The controls with which a trained student is compared."""
        if "teacher" in METHODS[method]:
            return {FULL: self.models["student"], **{f"{g}, {w}": row for (g, w), row in self.rounded.items()}}
        return self.controls[SEARCHED.get(method, method)][seed]


def _joined(figures: Mapping[str, Figures], name: str) -> Figures:
    """A model's figures with its KL to the unquantized student, if it was measured."""
    beside = figures.get(f"to_student/{name}")
    return {**figures[name], "kl_to_student": beside["kl_to_teacher"]} if beside else figures[name]


def rounded_rows(found: Mapping[tuple[str, str], Figures]) -> Iterator[dict[str, Any]]:
    """The rounded student, one row per grid and way."""
    for (grid, way), row in found.items():
        yield {"table": "rounded", "grid": grid, "way": way, **_figures([row])}


def control_rows(controls: Mapping[str, Sequence[Mapping[str, Figures]]]) -> Iterator[dict[str, Any]]:
    """The student trained longer in full precision, unrounded and rounded."""
    for method, runs in controls.items():
        for name in runs[0]:
            rows = [run[name] for run in runs]
            yield {"table": "controls", "loss": method, "model": name, **_figures(rows), "seeds": len(runs)}


def trained_rows(
    found: Mapping[tuple[str, str], list[Figures]], controls: Any, choice: Any
) -> Iterator[dict[str, Any]]:
    """The student trained on grids, with the fraction of the gap that the training closes."""
    for grid in GRIDS:
        for (name, method), runs in found.items():
            if name != grid:
                continue
            against = [controls(method, seed) for seed in range(len(runs))]
            scale, lr = choice(grid, method)
            yield {
                "table": "trained",
                "grid": grid,
                "method": method,
                **_figures(runs),
                "recovered": recovered(runs, against, f"{grid}, nearest"),
                "recovered_of_best": recovered(runs, against, f"{grid}, {best(grid)}"),
                "recovered_kl": recovered(runs, against, f"{grid}, nearest", "kl_to_teacher"),
                "scale": scale or "-",
                "lr": f"{lr:g}",
                "seeds": len(runs),
            }


def recovered(
    runs: Sequence[Figures], controls: Sequence[Mapping[str, Figures]], rounding: str, key: str = "loss_nats"
) -> Any:
    """Fraction of the loss of rounding that training recovers; None if rounding loses too little."""
    shares = [
        gap_closed(control[rounding][key], run[key], control[FULL][key])
        if control[rounding][key] - control[FULL][key] > LEAST_GAP
        else None
        for run, control in zip(runs, controls, strict=True)
    ]
    whole = [share for share in shares if share is not None]
    return result.spread(whole) if len(whole) == len(shares) else None


def peer_rows(peers: Sequence[quantization_peers.Peer]) -> Iterator[dict[str, Any]]:
    """The figures of each peer's model of the same student, or its last line of output."""
    for peer in peers:
        yield {
            "table": "peers",
            "peer": peer.name,
            **(_figures(peer.figures) if peer.figures else dict.fromkeys(FIGURES)),
            "seeds": len(peer.figures),
            "outcome": "measured" if peer.figures else peer.outcome,
        }


def rate_rows(rates: Mapping[tuple[str, str | None, str], Mapping[float, float]]) -> Iterator[dict[str, Any]]:
    """Validation perplexity for each learning rate that was tried."""
    tried = sorted({lr for found in rates.values() for lr in found})
    for (grid, scale, method), found in rates.items():
        name = f"{grid}, {scale}" if scale else grid
        yield {"table": "search", "grid": name, "method": method, **{f"{lr:g}": found.get(lr) for lr in tried}}


def _figures(runs: Sequence[Figures]) -> dict[str, Any]:
    return {key: result.spread([run[key] for run in runs]) for key in FIGURES if key in runs[0]}


def main() -> None:
    """Measure, and write the result after each cell."""
    parser = books.arguments(__doc__)
    parser.add_argument(
        "--student-tokens", type=int, default=600_000, help="tokens that the student is trained on (%(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="tokens per final run (default: %(default)s)")
    parser.add_argument("--search-tokens", type=int, default=SEARCH_TOKENS, help="tokens per search run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="final runs of each way (default: %(default)s)")
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=[], help="only these grids (default: all)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=[],
        help="only these methods; a method that uses another's learning rate must come after it (default: all)",
    )
    parser.add_argument("--result", default="quantization", help="name of the result (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budget = Budget(options.student_tokens, options.tokens, options.search_tokens, options.seeds)
    among = [f"--{key} {shlex.join(getattr(options, key))}" for key in ("grids", "methods") if getattr(options, key)]
    named = [] if options.result == "quantization" else [f"--result {options.result}"]
    found: list[dict[str, Any]] = []
    for found in Quantization(options.corpus, options.work, budget, options.grids, options.methods).run():
        result.write(
            options.result,
            command=" ".join(
                [
                    "python -m benchmarks.quantization --corpus BOOKS --work WORK",
                    f"--student-tokens {options.student_tokens} --tokens {options.tokens}",
                    f"--search-tokens {options.search_tokens} --seeds {options.seeds}",
                    *among,
                    *named,
                ]
            ),
            hardware=hardware.describe(options.threads),
            versions=hardware.versions("compressed-tensors"),
            rows=found,
            notes=[
                f"The student was trained on {budget.student_tokens:,} tokens before; each final run on "
                f"{budget.num_tokens:,}, {BATCH_SIZE} sequences of {books.SEQUENCE_LENGTH} per step; the runs of the "
                f"search on {budget.search_tokens:,}."
            ],
        )
    print(tables.table(found, where={"table": "trained"}))


if __name__ == "__main__":
    try:
        main()
    except DistillError as error:
        sys.exit(f"error: {error}")
