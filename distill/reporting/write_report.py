"""Writes the report as an HTML page, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distill.core.artifact import write_bytes, write_text
from distill.core.markdown import escaped, fenced
from distill.reporting import tables, task_tables, tradeoff, verdict, view
from distill.reporting.deliverables import speed_table
from distill.reporting.domains import domain_markdown, domain_table, worst_domain
from distill.reporting.plots import Plot, curve_plot, pareto_plot
from distill.reporting.require import Outcome
from distill.reporting.spreadsheet import csv_of_records
from distill.reporting.task_scores import TaskScores
from distill.reporting.task_verdict import task_verdict
from distill.reporting.tradeoff import Row
from distill.tracking.spec import Price

PAGE = Path(__file__).parent
Cuts = Mapping[str, Sequence["Plot"]]
"""Stage -> plots of its pruning scores, or of the sensitivity of its layers."""
Curves = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
"""stage -> series -> [(training tokens, value)]; a series is called ``train/TERM``, ``val/TERM`` or ``task/NAME``."""
TASK = "task/"


@dataclass(frozen=True)
class RunFacts:
    """Facts about the run for the report.

    Attributes:
        name: the run's name.
        created: date and time as text.
        recipe: the recipe's text.
        command: the command that reproduces the run.
        device, engine: used for the measurement of speed.
        batch, prompt_tokens, new_tokens, repeats, rounds: settings of the measurement; None: speed was not measured.
        price: of the machine by the recipe, or None.
        validation: the text on which quality was measured.
        validation_tokens: number of predicted tokens.
        pruning: lines on what was pruned.
        machine: table of each stage's load, memory and energy as rows of cells, headings first; may be empty.
        load: plot of the load of the machine over time, or None.
        searches: stage -> ranking of its search as rows of cells: headings, the chosen architecture, then the others.
        notes: other lines, such as licences or what was not done.
        versions: package -> version.
    """

    name: str
    created: str = ""
    recipe: str = ""
    command: str = ""
    device: str = ""
    engine: str = ""
    batch: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    repeats: int | None = None
    rounds: int | None = None
    price: Price | None = None
    validation: str = ""
    validation_tokens: int | None = None
    pruning: Sequence[str] = ()
    machine: Sequence[Sequence[str]] = ()
    load: Plot | None = None
    searches: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def measured(self) -> list[tuple[str, str]]:
        """(label, value) pairs on how the figures were measured; unknown values are omitted."""
        speed = [
            (self.batch, "batch {}"),
            (self.prompt_tokens, "{} prompt tokens"),
            (self.new_tokens, "{} new tokens"),
            (self.repeats, "median of {} repeats after a warm-up"),
            (self.rounds, "best of {} rounds"),
        ]
        tokens = "" if self.validation_tokens is None else f"{self.validation_tokens:,} tokens"
        pairs = [
            ("Device", self.device),
            ("Engine", self.engine),
            ("Speed", ", ".join(text.format(value) for value, text in speed if value is not None)),
            ("Validation", ", ".join(part for part in (self.validation, tokens) if part)),
            ("Versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]
        return [(label, value) for label, value in pairs if value]


def write_report(
    rows: Sequence[Row],
    curves: Curves,
    prompts: Sequence[Mapping[str, Any]],
    run_facts: RunFacts,
    folder: str | Path,
    cuts: Cuts | None = None,
    scans: Cuts | None = None,
    scores: TaskScores | None = None,
    required: Sequence[Outcome] = (),
    outlook: Sequence[Sequence[str]] = (),
) -> Path:
    """Write ``index.html`` (one file, no network), ``report.md``, ``table.csv``, ``rows.json`` and ``plots/*.png``.

    Where models were asked tasks, their scores and pairs are in ``tasks.csv`` and ``pairs.csv`` too.

    Args:
        rows: the measured models in the run's order.
        curves: see :data:`Curves`; empty for a run that trained nothing.
        prompts: from ``evaluation.side_by_side``; may be empty.
        run_facts: about the run.
        folder: created if it does not exist; each file is written atomically.
        cuts: stage -> plots of its pruning scores; None: nothing was pruned.
        scans: stage -> plots of the sensitivity of its layers; None: there are none.
        scores: of the models on tasks; None: there are no tasks.
        required: result of each requirement of the recipe.
        outlook: headings, then rows with the forecast of longer trainings; empty: there is none.

    Returns:
        The path of ``index.html``.

    Raises:
        MachineError: the disk is full or not writable.
    """
    folder = Path(folder)
    trade_offs, losses, cuts = trade_off_plots(rows), curve_plots(curves), cuts or {}
    scans, scores = scans or {}, scores or TaskScores()
    others = [run_facts.load] if run_facts.load is not None else []
    for plot in [
        *trade_offs,
        *others,
        *(plot for _, plots in [*losses, *cuts.items(), *scans.items()] for plot in plots),
    ]:
        write_bytes(folder / "plots" / f"{plot.name}.png", plot.png)
    write_text(folder / "rows.json", tradeoff.to_json(rows))
    write_text(folder / "table.csv", tables.csv_table(rows))
    for name, records in (("tasks.csv", scores.scores), ("pairs.csv", scores.pairs)):
        if records:
            write_text(folder / name, csv_of_records(records))
    found = (scores, required, outlook)
    write_text(folder / "report.md", markdown(rows, prompts, run_facts, trade_offs, *found))
    write_text(folder / "index.html", page(rows, trade_offs, losses, prompts, run_facts, cuts, scans, *found))
    return folder / "index.html"


def plots_of(folder: str | Path) -> dict[str, Path]:
    """Name -> PNG of every plot of a written report, for ``tracking.wandb.log_report``."""
    return {file.stem: file for file in sorted((Path(folder) / "plots").glob("*.png"))}


def trade_off_plots(rows: Sequence[Row]) -> list[Plot]:
    """Perplexity against size and against decode speed, where at least two rows have both."""
    wanted = (("weight_bytes", "Quality against size"), ("decode_tokens_per_s", "Quality against decode speed"))
    plots = [pareto_plot(rows, cost, title) for cost, title in wanted]
    return [plot for plot in plots if plot is not None]


def curve_plots(curves: Curves) -> list[tuple[str, list[Plot]]]:
    """(stage, one plot per loss term with training and validation)."""
    found = []
    for stage, series in curves.items():
        terms = dict.fromkeys(name.partition("/")[2] or name for name in series if not name.startswith(TASK))
        plots = [curve_plot(_file(f"{stage}_{name}"), f"accuracy on {name.removeprefix(TASK)}", (), values)
                 for name, values in series.items() if name.startswith(TASK)]  # fmt: skip
        for term in terms:
            train = series.get(f"train/{term}", series.get(term, ()))
            plots.append(
                curve_plot(_file(f"{stage}_{term}"), term.replace("_", " "), train, series.get(f"val/{term}", ()))
            )
        kept = [plot for plot in plots if plot is not None]
        if kept:
            found.append((stage, kept))
    return found


def _file(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in f"curve_{name}")


def page(
    rows: Sequence[Row],
    trade_offs: Sequence[Plot],
    losses: Sequence[tuple[str, Sequence[Plot]]],
    prompts: Sequence[Mapping[str, Any]],
    facts: RunFacts,
    cuts: Cuts,
    scans: Cuts,
    scores: TaskScores,
    required: Sequence[Outcome],
    outlook: Sequence[Sequence[str]],
) -> str:
    """The HTML page; the template escapes all values."""
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        facts=facts,
        style=(PAGE / "page.css").read_text(encoding="utf-8"),
        verdict=[*view.sentences(verdict.verdict(rows)), *_named(task_verdict(scores, rows))],
        tiles=view.tiles(rows),
        table=view.table(rows),
        speeds=speed_table(rows, facts.price),
        domains=domain_table(rows),
        worst=worst_domain(rows),
        trade_offs=trade_offs,
        gaps=verdict.gaps(rows),
        controls=verdict.controls(rows),
        bars=view.bars(rows),
        losses=losses,
        cuts={name: plots for name, plots in cuts.items() if plots},
        scans=scans,
        prompts=[view.marked(item) for item in prompts],
        scores=task_tables.score_rows(scores) if scores.scores else [],
        pairs=task_tables.pair_rows(scores) if scores.pairs else [],
        task_notes=scores.notes,
        required=required,
        outlook=outlook,
    )


def _named(sentences: Sequence[str]) -> list[tuple[str, str]]:
    """(name, rest) of sentences that begin with a name and a colon."""
    return [(name, rest) for name, _, rest in (sentence.partition(": ") for sentence in sentences)]


def markdown(
    rows: Sequence[Row],
    prompts: Sequence[Mapping[str, Any]],
    facts: RunFacts,
    trade_offs: Sequence[Plot],
    scores: TaskScores,
    required: Sequence[Outcome],
    outlook: Sequence[Sequence[str]],
) -> str:
    """The report as Markdown, for a terminal, a README or a model card."""
    said = [verdict.verdict(rows), *task_verdict(scores, rows)]
    parts = [f"# {escaped(facts.name)}", *map(escaped, said), "## Trade-off"]
    parts += [tables.markdown_table(rows).rstrip()]
    parts += [f"![{escaped(plot.title)}](plots/{plot.name}.png)" for plot in trade_offs]
    if speeds := speed_table(rows, facts.price):
        parts += ["## Speed and energy", _table_markdown(speeds)]
    if by_source := domain_markdown(rows):
        parts += ["## Source by source", by_source]
    if scores.scores:
        parts += ["## Tasks", task_tables.markdown_rows(task_tables.score_rows(scores))]
    if scores.pairs:
        parts += [task_tables.markdown_rows(task_tables.pair_rows(scores))]
    parts += [f"- {escaped(note)}" for note in scores.notes]
    if required:
        marks = {True: "reached", False: "**not reached**"}
        found = [f"- {marks[one.reached]}: {escaped(f'{one.key} {one.wanted}: {one.said}')}" for one in required]
        parts += ["## Required", "\n".join(found)]
    findings = [gap.text for gap in verdict.gaps(rows)] + verdict.controls(rows)
    for title, lines in (("Effect of training", findings), ("Pruning", facts.pruning), ("Notes", facts.notes)):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {escaped(line)}" for line in lines)]
    if outlook:
        parts += ["## What longer training would bring", task_tables.markdown_rows(outlook)]
    parts += [f"## Search of {name}\n\n{_table_markdown(lines)}" for name, lines in facts.searches.items()]
    if facts.machine:
        parts += [f"## What it took of the machine\n\n{_table_markdown(facts.machine)}"]
    if facts.measured():
        parts += [
            "## How it was measured",
            "\n".join(f"- {label}: {escaped(value)}" for label, value in facts.measured()),
        ]
    if prompts:
        parts.append("## Side by side")
        parts += [_prompt_markdown(item) for item in prompts]
    if facts.recipe:
        parts += ["## Recipe", fenced(facts.recipe, "yaml")]
    if facts.command:
        parts += ["## Reproduce", fenced(facts.command, "sh")]
    return "\n\n".join(parts) + "\n"


def _prompt_markdown(item: Mapping[str, Any]) -> str:
    answers = [
        f"**{escaped(name)}** ({view.counted(given)})\n\n{fenced(given['text'])}"
        for name, given in item["answers"].items()
    ]
    return "\n\n".join([f"Prompt:\n\n{fenced(item['prompt'])}", *answers])


def _table_markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(map(escaped, cells)) + " |" for cells in lines]
    return "\n".join([head, "|" + "---:|" * len(lines[0]), *body])
