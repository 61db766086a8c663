"""The report stage at work: gather, let the models answer, write, and send."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from distill.core.artifact import write_text
from distill.core.errors import InputError
from distill.core.run_folder import Done
from distill.core.versions import versions
from distill.data.mixture import Mixture
from distill.data.spec import DataSpec
from distill.pruning.origin import PLAN
from distill.reporting.domains import domain_figures, worst_domain
from distill.reporting.machine_load import load_plot, usage_table
from distill.reporting.require import outcomes
from distill.reporting.tables import measured_figures, whole_table
from distill.reporting.task_tables import pair_rows, score_rows
from distill.reporting.task_verdict import task_verdict
from distill.reporting.verdict import verdict
from distill.reporting.write_report import RunFacts, plots_of, write_report
from distill.stages.evaluate import Evaluate
from distill.stages.evaluate.stored_rows import by_text, measured_rows, scores_of
from distill.stages.passes import in_words
from distill.stages.prune import Prune
from distill.stages.prune.run import SCORES, score_plots_of
from distill.stages.prune.search.ranking import SEARCH, ranking
from distill.stages.quantize.mixed import FILE as SCAN
from distill.stages.quantize.mixed import scan_plot
from distill.stages.report.left import Left, loss_curves
from distill.stages.report.outlook import outlook
from distill.stages.report.prompt_answers import answers_to
from distill.stages.report.spec import ANSWERS, Report
from distill.stages.session import Session, StageContext
from distill.stages.text import data_of
from distill.tracking.hardware import read_samples
from distill.tracking.usage import usages
from distill.tracking.wandb import log_report


def run(stage: Report, context: StageContext) -> dict[str, Any]:
    """Gather, let the models answer, write, and send."""
    session = context.session
    rows = measured_rows(context)
    if not rows:
        raise InputError(_nothing(context))
    answers = answers_to(stage, context, rows)
    write_text(context.folder / ANSWERS, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    left = Left(session.run)
    curves = loss_curves(left, session.stages)
    cuts = {
        name: score_plots_of(files[0], files[1], name)
        for name in session.stages
        if _cut(context, name) and (files := left.files(name, SCORES, PLAN))
    }
    scans = {name: [scan_plot(files[0], name)] for name in session.stages if (files := left.files(name, SCAN))}
    names = list(session.stages)
    scores = scores_of(session.run, names[: names.index(context.name)])
    required = outcomes(session.require, rows, scores)
    facts = _facts(context, rows, left)
    same, _ = by_text(session.run, names[: names.index(context.name)])
    texts = {name: data_of(session.stages, session.data, name) for name in names}
    longer = outlook(left, {name: session.stages[name] for name in names if texts[name] == texts[same[-1]]}, rows)
    page = write_report(rows, curves, answers, facts, context.folder, cuts, scans, scores, required, longer)
    for note in left.notes:
        context.say(note)
    if session.logger() is not None:
        figures = measured_figures(rows) | domain_figures(rows) | scores.figures()
        tables = {"tasks": score_rows(scores), "pairs": pair_rows(scores)} if scores.scores else {}
        log_report(session.logger(), whole_table(rows), figures, plots_of(context.folder), page, answers, tables)
    said = [*verdict(rows).splitlines(), *task_verdict(scores, rows)]
    for line in said:
        context.say(line)
    if worst := worst_domain(rows):
        context.say(worst)
    context.say(f"report: {page}")
    return {"page": page.name, "verdict": "\n".join(said)}


def _cut(context: StageContext, name: str) -> Done | None:
    """What a prune stage that is finished left; None for any other stage."""
    return context.session.run.done(name) if isinstance(context.session.stages[name], Prune) else None


def _facts(context: StageContext, rows: list[Any], left: Left) -> Any:
    session = context.session
    names = list(session.stages)
    before = names[: names.index(context.name)]
    same, others = by_text(session.run, before)
    text = session.of_text(data_of(session.stages, session.data, same[-1]))
    measuring = [stage for name in before if isinstance(stage := session.stages[name], Evaluate)]
    speeds = [stage.speed for stage in measuring if stage.speed is not None]
    speed: dict[str, Any] = {}
    if speeds:
        one = speeds[-1]
        speed = {"batch": one.batch_size, "prompt_tokens": one.prompt_tokens, "new_tokens": one.new_tokens}
        speed |= {"repeats": one.repeats, "rounds": one.rounds}
    measured = next((row for row in rows if row.device and not row.is_file), rows[0])
    corpus, samples = text.corpus(), read_samples(session.run.folder)
    pruning = []
    for name in session.stages:
        if done := _cut(context, name):
            pruning += [f"{name}: {line}" for line in done.figures["plan"]]
    return RunFacts(
        name=session.recipe,
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        recipe=session.text,
        command=session.command,
        device=measured.device or "",
        engine=", ".join(part for part in (measured.engine, measured.dtype) if part),
        validation=_validation(text.data),
        validation_tokens=corpus.validation.num_predictions(),
        pruning=pruning,
        searches={name: ranking(files[0]) for name in session.stages if (files := left.files(name, SEARCH))},
        price=session.logging.price,
        notes=[*left.notes, *map(_left_out, others), *corpus.notes(), *_passes(session)],
        versions=versions(),
        machine=usage_table(usages(samples), session.logging.price),
        load=load_plot(samples),
        **speed,
    )


def _left_out(stage: str) -> str:
    return f"{stage} measured on another text than the last evaluate stage; its figures are in its own rows.json alone"


def _passes(session: Session) -> list[str]:
    """A line for each training on a mixture: how often it read which source."""
    done = {name: session.run.done(name) for name in session.stages}
    times = {
        name: left.figures["passes"] for name, left in done.items() if left is not None and "passes" in left.figures
    }
    return [f"{name}: {in_words(often)}" for name, often in times.items()]


def _nothing(context: StageContext) -> str:
    """Why there are no rows."""
    names = list(context.session.stages)
    before = names[: names.index(context.name)]
    measuring = [name for name in before if isinstance(context.session.stages[name], Evaluate)]
    if not measuring:
        return "there is nothing to report: no evaluate stage stands before this one"
    return f"there is nothing to report: {measuring[-1]} is not finished; run it by --from {measuring[-1]}"


def _validation(data: DataSpec) -> str:
    """What quality was measured on, in words."""
    if isinstance(data.train, Mixture):
        own, parts = data.train.validation, []
        for name, source in data.train.sources.items():
            how = f"from {own[name].kind}" if name in own else "held out"
            said = ", what the assistant writes" if own.get(name, source).holds_conversations() else ""
            parts.append(f"{name} {how}{said}")
        return "; ".join(parts)
    kind = data.validation.kind if data.validation else f"{data.train.kind}, held out"
    return f"{kind}, what the assistant writes" if (data.validation or data.train).holds_conversations() else kind
