"""The search of a prune stage: from a budget to the sizes that fit it best, each step narrower and dearer.

    all that fit  ->  estimated from cuts along one axis  ->  cut and measured  ->  trained for a while and measured

Better means less KL from the uncut model on calibration sequences; the validation text plays no part in the choice.
What has been measured is kept as it comes, and each training has its own checkpoints, so that a kill loses little.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from distill.core.artifact import hash_of, write_text
from distill.core.run import CHECKPOINTS
from distill.core.spec import Spec
from distill.pruning.budget import Costs, SizeBudget
from distill.pruning.keep import KeepSpec
from distill.pruning.search import Candidate, SizeKey, Space
from distill.stages.base import StageContext
from distill.training.spec import BudgetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.pruning.base import Scores
    from distill.pruning.layout import Config, Layout
    from distill.pruning.plan import Plan

SEARCH = "search.json"
SECONDS_BETWEEN_LINES = 15.0


class ShortTraining(BudgetSpec):
    """How the best candidates are trained before one of them is chosen: on the uncut model's logits, by forward KL."""

    num_candidates: int = Field(3, ge=2)
    """Candidates to train, the best by measurement."""


class SearchSpec(Spec):
    """Which architectures to look at for a budget, and how closely."""

    budget: SizeBudget
    """The most that the pruned model may cost, such as {non_embedding_parameters: 50%}."""
    axes: tuple[SizeKey, ...] = Field(("hidden_size", "intermediate_size", "num_hidden_layers"), min_length=1)
    """Sizes that may be cut; the others stay whole."""
    multiple_of: dict[SizeKey, PositiveInt] = Field({})
    """What a size is a multiple of; where unset 64 for hidden_size and intermediate_size, the number of KV groups for
    num_attention_heads while groups stay, else 1. The whole size is always allowed."""
    smallest_share: float = Field(0.5, gt=0, le=1)
    """No size falls below this share of the model's."""
    layer_choice: Literal["lowest", "contiguous"] = "lowest"
    """Which layers are dropped: those of lowest score, or the block of neighbours with the lowest sum."""
    num_sequences: int = Field(32, ge=1)
    """Calibration sequences that a candidate is measured on, at most data.calibration_sequences."""
    num_measured: int = Field(16, ge=1)
    """Candidates that are cut and measured, the best by estimate."""
    train: ShortTraining | None = None
    """Training of the best before one is chosen, such as {num_tokens: 1e6}; null chooses right after the cut."""

    @model_validator(mode="after")
    def _each_round_is_narrower(self) -> SearchSpec:
        if len({*self.axes}) < len(self.axes):
            raise ValueError(f"axes names one twice (got {', '.join(self.axes)})")
        if strange := [key for key in self.multiple_of if key not in self.axes]:
            raise ValueError(f"multiple_of.{strange[0]} has no effect: axes does not name it")
        if self.layer_choice != "lowest" and "num_hidden_layers" not in self.axes:
            raise ValueError(f"layer_choice {self.layer_choice!r} has no effect: axes does not name num_hidden_layers")
        if self.train is not None and self.train.num_candidates > self.num_measured:
            raise ValueError(
                f"train.num_candidates ({self.train.num_candidates}) is more than num_measured ({self.num_measured})"
            )
        return self

    def space(self, layout: Layout, config: Config) -> Space:
        """The architectures of the search.

        Raises:
            InputError: see :class:`~distill.pruning.search.Space`.
        """
        return Space(layout, config, self.axes, self.multiple_of, self.smallest_share)

    def costs(self, layout: Layout, config: Config, *, sequence_length: int, dtype: str) -> Costs:
        """What architectures cost by the budget's measure, stored as ``dtype``."""
        size = 2 if dtype in ("bfloat16", "float16") else 4
        return Costs(self.budget.measure, layout, config, context_tokens=sequence_length, bytes_per_parameter=size)

    def candidates(self, space: Space, costs: Costs) -> list[Candidate]:
        """The architectures that fit the budget.

        Raises:
            InputError: there are none.
        """
        return space.candidates(costs, *self.budget.bounds(costs.of(space.before)))

    def keep(self, sizes: dict[str, int]) -> KeepSpec:
        """Sizes as a recipe would state them."""
        where = {"layer_choice": self.layer_choice} if "num_hidden_layers" in sizes else {}
        return KeepSpec.model_validate({**sizes, **where})


class Search:
    """One search, from candidates to the choice.

    Args:
        context: of the stage.
        spec: what to look at.
        reference: the uncut model.
        space: the architectures.
        costs: what they cost.
        scores: of all axes of the search.
        batch_size: calibration sequences a forward pass.
    """

    def __init__(
        self,
        context: StageContext,
        spec: SearchSpec,
        reference: str,
        space: Space,
        costs: Costs,
        scores: Scores,
        batch_size: int,
    ):
        self.context, self.spec, self.reference, self.space, self.costs = context, spec, reference, space, costs
        self._scores, self._batch_size = scores, batch_size
        self._folder = context.folder / CHECKPOINTS
        self._found = _Found(self._folder / SEARCH)

    def choose(self) -> KeepSpec:
        """The sizes of the best candidate; writes ``search.json``.

        Raises:
            InputError: nothing fits the budget.
        """
        candidates = self.spec.candidates(self.space, self.costs)
        knots = self.space.knots()
        num_cut = min(self.spec.num_measured, len(candidates))
        low, high = self.spec.budget.bounds(self.costs.of(self.space.before))
        self.context.say(f"search: {len(candidates):,} architectures of {low:,.0f} to {high:,.0f} {self.costs.measure}")
        pace = _Pace(self.context, len(knots) + num_cut)
        alone = {knot: pace.of(self._cut_loss("alone", dict([knot])))["kl"] for knot in knots}
        # Of equal estimates the larger model, then the order of the grid.
        ranked = sorted(candidates, key=lambda c: (self.space.estimate(c, alone), -c.cost))[:num_cut]
        cut = {c.name: pace.of(self._cut_loss("cut", c.keep)) for c in ranked}
        ranked.sort(key=lambda c: float(cut[c.name]["kl"]))
        self.__dict__.pop("_whole", None)  # training loads it anew, where compute wants it
        trained = self._train(ranked)
        ranked.sort(key=lambda c: float(trained.get(c.name, {"kl": float("inf")})["kl"]))
        rows = [
            {
                "keep": c.keep,
                self.costs.measure: c.cost,
                "estimated_kl": self.space.estimate(c, alone),
                "cut": cut[c.name],
                "trained": trained.get(c.name),
            }
            for c in ranked
        ]
        found = {"measure": self.costs.measure, "num_candidates": len(candidates), "least": low, "most": high}
        write_text(self.context.folder / SEARCH, json.dumps({**found, "ranking": rows}, indent=2) + "\n")
        lines = ranking(self.context.folder)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for cells in lines:
            self.context.say("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
        return self.spec.keep(ranked[0].keep)

    def _train(self, ranked: Sequence[Candidate]) -> dict[str, Any]:
        """What the best candidates are after a short training, by name."""
        if self.spec.train is None:
            return {}
        some = ranked[: self.spec.train.num_candidates]
        pace = _Pace(self.context, len(some), every_s=0.0)
        return {candidate.name: pace.of(self._trained_loss(candidate)) for candidate in some}

    def _plan(self, keep: dict[str, int]) -> Plan:
        from distill.pruning.plan import plan

        return plan(self._scores, self.spec.keep(keep), self.space.layout, self.space.config)

    def _cut_loss(self, kind: str, keep: dict[str, int]) -> dict[str, Any]:
        """How far a cut model is from the whole one."""
        from distill.pruning.surgery import apply

        def measure() -> dict[str, Any]:
            return self._loss(apply(self._whole, self._plan(keep), self.space.layout), self._whole)

        return self._found.get(kind, ",".join(f"{key}={size}" for key, size in keep.items()), measure)

    def _trained_loss(self, candidate: Candidate) -> dict[str, Any]:
        return self._found.get("trained", candidate.name, lambda: self._train_one(candidate))

    def _train_one(self, candidate: Candidate) -> dict[str, Any]:
        import torch

        from distill.losses import ForwardKL
        from distill.models.load import move
        from distill.models.shards import carve_folder
        from distill.stages.train import load_frozen, train
        from distill.training.assemble import assemble, disassemble
        from distill.training.trainer import resolve_device

        assert self.spec.train is not None
        session, folder = self.context.session, self._folder / candidate.name
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(int(hash_of(session.seed, self.context.name, candidate.name), 16) % 2**63)
        location = session.artifact(self.reference).location
        start = carve_folder(location, self._plan(candidate.keep), self.space.layout, torch.float32)
        student = assemble(start, gradient_checkpointing=session.compute.gradient_checkpointing)
        own = replace(self.context, name=f"{self.context.name}/{candidate.name}", folder=folder)
        figures = train(own, student, [ForwardKL()], self.spec.train, teacher=self.reference)
        device = resolve_device(session.compute)
        whole = move(load_frozen(self.context, self.reference), device)
        return self._loss(move(disassemble(student), device), whole) | figures

    def _loss(self, model: PreTrainedModel, whole: PreTrainedModel) -> dict[str, Any]:
        from distill.evaluation.quality import measure_quality

        quality = measure_quality(model, whole, self._batches)
        return {"kl": quality.kl_to_teacher, "perplexity": quality.perplexity}

    @cached_property
    def _whole(self) -> PreTrainedModel:
        """The uncut model, while cuts are measured against it."""
        from distill.models.load import load_model, move
        from distill.stages.train import check_packing
        from distill.training.trainer import resolve_device

        device = resolve_device(self.context.session.compute)
        location = self.context.session.artifact(self.reference).location
        model = load_model(location, dtype="float32" if device == "cpu" else "auto")
        return move(check_packing(self.context, model), device)

    @cached_property
    def _batches(self) -> list[Any]:
        corpus = self.context.session.corpus()
        num_sequences = min(self.spec.num_sequences, corpus.calibration_sequences)
        return list(corpus.calibration_loader(num_sequences, self._batch_size))


class _Found:
    """What has been measured, kept in a file as it comes; another process goes on from there."""

    def __init__(self, file: Path):
        self._file = file
        self._all: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def get(self, kind: str, name: str, measure: Any) -> dict[str, Any]:
        """What was measured before, or is now."""
        key = f"{kind} {name}"
        if key not in self._all:
            self._all[key] = measure()
            write_text(self._file, json.dumps(self._all))
        found: dict[str, Any] = self._all[key]
        return found


class _Pace:
    """Says now and then how many of so many are done, and when the rest will be."""

    def __init__(self, context: StageContext, total: int, *, every_s: float = SECONDS_BETWEEN_LINES):
        self._context, self._total, self._every_s, self._done = context, total, every_s, 0
        self._start = self._line = time.monotonic()

    def of(self, result: dict[str, Any]) -> dict[str, Any]:
        """Count one more result, and pass it on."""
        self._done, now = self._done + 1, time.monotonic()
        if now - self._line >= self._every_s and self._done < self._total:
            self._line = now
            left = (now - self._start) / self._done * (self._total - self._done)
            self._context.say(f"search: {self._done} of {self._total} candidates, {left:.0f} s left")
        return result


def ranking(folder: Path, most: int = 10) -> list[list[str]]:
    """The best of a finished search as a table, headings first, the chosen one next; empty without a search."""
    if not (folder / SEARCH).is_file():
        return []
    found = json.loads((folder / SEARCH).read_text(encoding="utf-8"))
    keys = list(dict.fromkeys(key for row in found["ranking"] for key in row["keep"]))
    measure, titles = found["measure"], ["estimated KL", "KL when cut", "KL after training"]
    lines = [[*keys, measure.replace("_", " "), *titles]]
    for row in found["ranking"][:most]:
        trained = f"{row['trained']['kl']:.4f}" if row["trained"] else "-"
        figures = [f"{row[measure]:,.0f}", f"{row['estimated_kl']:.4f}", f"{row['cut']['kl']:.4f}", trained]
        lines.append([*(str(row["keep"].get(key, "whole")) for key in keys), *figures])
    return lines
