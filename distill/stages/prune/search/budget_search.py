"""The search itself: from a budget to the sizes that fit it best. Each step costs more per candidate and has fewer.

    all that fit  ->  estimated from cuts along one axis  ->  cut and measured  ->  trained for a while and measured

Beside the best goes a control: of all that fit, the one that keeps the most even shares of its axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from distill.core.errors import InputError
from distill.core.run_folder import CHECKPOINTS
from distill.pruning.base import Scores
from distill.pruning.budget import Cost, format_cost
from distill.pruning.keep import KeepSpec
from distill.pruning.layout import Config, Layout
from distill.pruning.search import Candidate, SearchSpace
from distill.stages.progress_lines import ProgressLines
from distill.stages.prune.search.clock import Clock
from distill.stages.prune.search.measurement_cache import MeasurementCache
from distill.stages.prune.search.ranking import SEARCH, UNIFORM, as_text, ranking, write_ranking
from distill.stages.prune.search.spec import SearchSpec
from distill.stages.prune.search.trials import Trials
from distill.stages.session import StageContext

TRIES = 2
"""Architectures whose latency is measured, for each that may be cut: a forecast errs to both sides."""
LEAST_TRIES = 8
CANDIDATES = ("search", "candidates")


class Search:
    """One search, from candidates to the choice.

    Args:
        context: of the stage.
        spec: what to look at.
        reference: the uncut model.
        layout: the layout of its architecture.
        config: its config.
        dtype: in which the pruned model will be stored.
        batch_size: calibration sequences per forward pass.

    Raises:
        InputError: nothing fits the budget.
    """

    def __init__(
        self,
        context: StageContext,
        spec: SearchSpec,
        reference: str,
        layout: Layout,
        config: Config,
        dtype: str,
        batch_size: int,
    ):
        self.context, self.spec, self.reference, self._batch_size = context, spec, reference, batch_size
        self.space: SearchSpace = spec.space(layout, config)
        self._cache = MeasurementCache(context.folder / CHECKPOINTS / SEARCH)
        self._clock = Clock(context, reference, self.space, dtype, self._cache)
        length = context.session.data.sequence_length
        self.costs: Cost
        if spec.budget.is_time:
            self.costs = self._clock.forecast(spec.costs(layout, config, sequence_length=length, dtype=dtype))
            whole = self._clock.ms(self.space.before)
            with self._measured_anew_if_refused():
                self._refuse_noise(whole)
        else:
            self.costs = spec.costs(layout, config, sequence_length=length, dtype=dtype)
            whole = self.costs.of(self.space.before)
        self.least, self.most = spec.budget.bounds(whole)
        with self._measured_anew_if_refused():
            self.candidates = self.space.candidates(self.costs, self.least, self.most)

    @contextmanager
    def _measured_anew_if_refused(self) -> Iterator[None]:
        """Measure again after a refusal, because other load on the machine may have disturbed the timing."""
        try:
            yield
        except InputError:
            self._clock.forget()
            raise

    def _refuse_noise(self, whole: float) -> None:
        most, forecast = self.spec.budget.bounds(whole)[1], self.costs.of(self.space.before)
        if most >= forecast:
            raise InputError(
                f"search.budget.{self.costs.measure}: {most:.3f} cuts nothing: the model took {whole:.3f} ms, and "
                f"{forecast:.3f} ms by what smaller ones took; ask for less, or measure while the machine is idle"
            )

    def choose(self, scores: Scores) -> KeepSpec:
        """The sizes of the best candidate by the scores of all axes; writes ``search.json``.

        Raises:
            InputError: nothing fits the budget when it is measured.
        """
        trials = Trials(self.context, self.spec, self.reference, self.space, scores, self._batch_size, self._cache)
        measure, knots = self.costs.measure, self.space.knots()
        low, high = format_cost(measure, self.least), format_cost(measure, self.most)
        forecast = " by forecast" if self.spec.budget.is_time else ""
        self.context.say(f"search: {len(self.candidates):,} architectures of {low} to {high} {measure}{forecast}")
        progress = ProgressLines(
            self.context, len(knots) + min(self.spec.num_measured, len(self.candidates)) + 1, CANDIDATES
        )
        along_one = {knot: float(progress.count(trials.along_axis(*knot))["kl"]) for knot in knots}
        estimates = {c.name: self.space.estimate(c, along_one) for c in self.candidates}
        # Of equal estimates the larger model, then the order of the grid.
        best = self._first(lambda c: (estimates[c.name], -c.cost), self.spec.num_measured)
        uniform = self._first(lambda c: (self.space.unevenness(c), -c.cost), 1)[0]
        some = [*best, *([uniform] if uniform.name not in {c.name for c in best} else [])]
        cut = {c.name: progress.count(trials.cut(c)) for c in some}
        some.sort(key=lambda c: float(cut[c.name]["kl"]))
        trials.end_of_cuts()
        trained = self._train(trials, some, uniform)
        some.sort(key=lambda c: float(trained.get(c.name, {"kl": float("inf")})["kl"]))
        rows = [
            {
                "keep": c.keep,
                measure: c.cost,
                "estimated_kl": estimates[c.name],
                "cut": cut[c.name],
                "trained": trained.get(c.name),
                UNIFORM: c.name == uniform.name,
            }
            for c in some
        ]
        about = {"measure": measure, "num_candidates": len(self.candidates), "least": self.least, "most": self.most}
        write_ranking(self.context.folder, about, rows)
        for line in as_text(ranking(self.context.folder / SEARCH)):
            self.context.say(line)
        return self.spec.keep(some[0].keep)

    def _train(self, trials: Trials, ranked: Sequence[Candidate], uniform: Candidate) -> dict[str, dict[str, float]]:
        """What the best candidates and the control are after a short training, by name."""
        if self.spec.train is None:
            return {}
        best = ranked[: self.spec.train.num_candidates]
        some = [*best, *([uniform] if uniform not in best else [])]
        progress = ProgressLines(self.context, len(some), CANDIDATES, every_s=0.0)
        return {candidate.name: progress.count(trials.trained(candidate)) for candidate in some}

    def _first(self, order: Callable[[Candidate], tuple[float, ...]], count: int) -> list[Candidate]:
        """The first candidates in an order; of a budget of time those that take no longer when they are measured."""
        ordered = sorted(self.candidates, key=order)
        if not self.spec.budget.is_time:
            return ordered[:count]
        timed: list[Candidate] = []
        fitting: list[Candidate] = []
        for candidate in ordered[: max(TRIES * count, LEAST_TRIES)]:
            timed.append(replace(candidate, cost=self._clock.ms(candidate.sizes)))
            fitting += [timed[-1]] * (timed[-1].cost <= self.most)
            if len(fitting) == count:
                break
        if fitting:
            return fitting
        self._clock.forget()
        raise InputError(
            f"search.budget.{self.costs.measure}: of {len(self.candidates):,} architectures that were forecast to take "
            f"at most {self.most:.3f} ms the first {len(timed)} take {min(c.cost for c in timed):.3f} ms and more; "
            "raise it, or measure on a machine that does nothing else"
        )
