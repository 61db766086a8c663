"""The report of a run: what was won and what it cost, on one page that opens in any browser."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from distill.core.run import Done, Run
from distill.stages.base import StageContext, StageSpec
from distill.stages.evaluate import Evaluate, measured_rows
from distill.stages.mixed import scan_plot
from distill.stages.prune import Prune, score_plots_of
from distill.stages.search.ranking import ranking

PROMPTS = ("The ", "In the beginning", "def main(")


class Report(StageSpec):
    """Write index.html, report.md and table.csv from what the run has measured, and send them to W&B."""

    kind: Literal["report"] = "report"
    prompts: tuple[str, ...] = Field(PROMPTS)
    """Texts that the models continue greedily, side by side; empty: none."""
    models: tuple[str, ...] = ()
    """Models that answer, by reference; empty: the teacher and every measured student that was trained."""
    new_tokens: int = Field(48, ge=1)
    """Tokens of an answer at most."""

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The models that are named."""
        return [(("models", i), reference) for i, reference in enumerate(self.models)]

    def reads(self, earlier: list[str]) -> list[str]:
        """Everything that stands before it."""
        return list(dict.fromkeys([*self.models, *earlier]))

    def speaker(self) -> str | None:
        """It shows the run's text, and models answer in their own tokens."""
        return None

    def shown(self, figures: dict[str, Any]) -> str | None:
        """The page."""
        return str(figures["page"])

    def run(self, context: StageContext) -> dict[str, Any]:
        """Gather, let the models answer, write, and send."""
        from distill.core.errors import InputError
        from distill.stages.report_page.write import plots_of, write_report
        from distill.tracking.verdict import verdict

        session = context.session
        rows = measured_rows(context)
        if not rows:
            raise InputError("there is nothing to report: no evaluate stage stands before this one")
        answers = self._answers(context, rows)
        curves = loss_curves(session.run, session.stages)
        cuts = {
            name: score_plots_of(session.run.stage(name), name) for name in session.stages if self._cut(context, name)
        }
        finished = [name for name in session.stages if session.run.done(name)]
        scans = {name: [plot] for name in finished if (plot := scan_plot(session.run.stage(name), name))}
        page = write_report(rows, curves, answers, self._facts(context, rows), context.folder, cuts, scans)
        if session.logger() is not None:
            from distill.tracking.wandb import log_tradeoff

            log_tradeoff(session.logger(), rows, plots_of(context.folder), page, answers)
        for line in verdict(rows).splitlines():
            context.say(line)
        context.say(f"report: {page}")
        return {"page": page.name, "verdict": verdict(rows)}

    def _answers(self, context: StageContext, rows: list[Any]) -> list[dict[str, Any]]:
        from distill.evaluation.side_by_side import side_by_side
        from distill.training.trainer import resolve_device

        trained = [row.name for row in rows if row.role == "teacher" or (row.role == "student" and row.training_tokens)]
        names = list(self.models) or trained
        if not self.prompts or not names:
            return []
        device = resolve_device(context.session.compute)
        return side_by_side(
            {name: context.session.artifact(name).location for name in names},
            self.prompts,
            new_tokens=self.new_tokens,
            device=device,
            dtype="auto" if device == "cuda" else "float32",
            simulated=[row.name for row in rows if row.kernel == "simulated"],
        )

    def _cut(self, context: StageContext, name: str) -> Done | None:
        """What a prune stage that is finished left; None for any other stage."""
        return context.session.run.done(name) if isinstance(context.session.stages[name], Prune) else None

    def _facts(self, context: StageContext, rows: list[Any]) -> Any:
        from distill.core.versions import versions
        from distill.stages.report_page.write import RunFacts

        session = context.session
        speeds = [s.speed for s in session.stages.values() if isinstance(s, Evaluate) and s.speed is not None]
        speed: dict[str, Any] = {}
        if speeds:
            one = speeds[-1]
            speed = {"batch": one.batch_size, "prompt_tokens": one.prompt_tokens, "new_tokens": one.new_tokens}
            speed |= {"repeats": one.repeats, "rounds": one.rounds}
        measured = next((row for row in rows if row.device), rows[0])
        corpus = session.corpus()
        pruning = []
        for name in session.stages:
            if done := self._cut(context, name):
                pruning += [f"{name}: {line}" for line in done.figures["plan"]]
        return RunFacts(
            name=session.recipe,
            created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            recipe=session.text,
            command=session.command,
            device=measured.device or "",
            engine=", ".join(part for part in (measured.engine, measured.dtype) if part),
            validation=session.data.validation.kind
            if session.data.validation
            else f"{session.data.train.kind}, held out",
            validation_tokens=corpus.validation.num_predictions(),
            pruning=pruning,
            searches={
                name: lines
                for name in session.stages
                if self._cut(context, name)
                if (lines := ranking(session.run.stage(name)))
            },
            versions=versions(),
            **speed,
        )


def loss_curves(run: Run, stages: Iterable[str]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Losses by stage and term against the tokens trained on."""
    from distill.training.metrics import read_rows

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name in stages:
        series: dict[str, list[tuple[float, float]]] = {}
        for row in read_rows(run.stage(name)):
            for key, value in row.items():
                if key.startswith(("train/", "val/")) and "tokens" in row:
                    series.setdefault(key, []).append((row["tokens"], value))
        if series:
            curves[name] = series
    return curves
