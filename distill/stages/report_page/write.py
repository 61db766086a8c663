"""The report: one page that says what the student won and lost, and the same as Markdown and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.artifact import write_bytes, write_text
from distill.stages.report_page import view
from distill.tracking import tables, tradeoff, verdict
from distill.tracking.tradeoff import Row

if TYPE_CHECKING:
    from distill.stages.report_page.plots import Plot

PAGE = Path(__file__).parent
Cuts = Mapping[str, Sequence["Plot"]]
"""stage -> pictures of the scores by which it cut, or of the scan by which it chose grids."""
Curves = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
"""stage -> series -> [(training tokens, value)]; a series is called ``train/TERM`` or ``val/TERM``."""


@dataclass(frozen=True)
class RunFacts:
    """What the report says about the run itself.

    Attributes:
        name: the run's name.
        created: date and time as text.
        recipe: the recipe's text.
        command: what reproduces the run.
        device: what speed was measured on; engine: with what.
        batch, prompt_tokens, new_tokens, repeats, rounds: how speed was measured; None: it was not.
        validation: what quality was measured on, in words.
        validation_tokens: how many predictions counted.
        pruning: lines that say what was cut.
        searches: stage -> the ranking of its search as rows of cells, headings first, the chosen architecture next.
        notes: further lines for the reader, such as licences or what was not done.
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
    validation: str = ""
    validation_tokens: int | None = None
    pruning: Sequence[str] = ()
    searches: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def measured(self) -> list[tuple[str, str]]:
        """(label, value) of how the figures came about, without what is not known."""
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
) -> Path:
    """Write ``index.html`` (one file, no network), ``report.md``, ``table.csv``, ``rows.json`` and ``plots/*.png``.

    Args:
        rows: the measured models in the run's order.
        curves: see :data:`Curves`; empty for a run that trained nothing.
        prompts: as ``evaluation.side_by_side`` returns them; may be empty.
        run_facts: about the run.
        folder: made if need be; each file is written whole or not at all.
        cuts: stage -> pictures of the scores by which it cut; None: nothing was cut.
        scans: stage -> pictures of what each layer costs on each grid; None: no grid was chosen so.

    Returns:
        The path of ``index.html``.

    Raises:
        MachineError: the disk is full or not writable.
    """
    folder = Path(folder)
    trade_offs, losses, cuts = trade_off_plots(rows), curve_plots(curves), cuts or {}
    scans = scans or {}
    for plot in [*trade_offs, *(plot for _, plots in [*losses, *cuts.items(), *scans.items()] for plot in plots)]:
        write_bytes(folder / "plots" / f"{plot.name}.png", plot.png)
    write_text(folder / "rows.json", tradeoff.to_json(rows))
    write_text(folder / "table.csv", tables.csv_table(rows))
    write_text(folder / "report.md", markdown(rows, prompts, run_facts, trade_offs))
    write_text(folder / "index.html", page(rows, trade_offs, losses, prompts, run_facts, cuts, scans))
    return folder / "index.html"


def plots_of(folder: str | Path) -> dict[str, Path]:
    """Name -> PNG of every plot of a written report, for ``tracking.wandb.log_tradeoff``."""
    return {file.stem: file for file in sorted((Path(folder) / "plots").glob("*.png"))}


def trade_off_plots(rows: Sequence[Row]) -> list[Plot]:
    """Perplexity against size and against decode speed, where at least two rows have both."""
    from distill.stages.report_page.plots import pareto_plot

    wanted = (("weight_bytes", "Quality against size"), ("decode_tokens_per_s", "Quality against decode speed"))
    plots = [pareto_plot(rows, cost, title) for cost, title in wanted]
    return [plot for plot in plots if plot is not None]


def curve_plots(curves: Curves) -> list[tuple[str, list[Plot]]]:
    """(stage, a plot a loss term), training and validation of a term together."""
    from distill.stages.report_page.plots import curve_plot

    found = []
    for stage, series in curves.items():
        terms = dict.fromkeys(name.partition("/")[2] or name for name in series)
        plots = []
        for term in terms:
            train = series.get(f"train/{term}", series.get(term, ()))
            file = "".join(c if c.isalnum() or c in "-_" else "_" for c in f"curve_{stage}_{term}")
            plots.append(curve_plot(file, term.replace("_", " "), train, series.get(f"val/{term}", ())))
        kept = [plot for plot in plots if plot is not None]
        if kept:
            found.append((stage, kept))
    return found


def page(
    rows: Sequence[Row],
    trade_offs: Sequence[Plot],
    losses: Sequence[tuple[str, Sequence[Plot]]],
    prompts: Sequence[Mapping[str, Any]],
    facts: RunFacts,
    cuts: Cuts,
    scans: Cuts,
) -> str:
    """The whole page as text; everything from outside is escaped by the template."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        facts=facts,
        style=(PAGE / "page.css").read_text(encoding="utf-8"),
        verdict=view.sentences(verdict.verdict(rows)),
        tiles=view.tiles(rows),
        table=view.table(rows),
        trade_offs=trade_offs,
        gaps=verdict.gaps(rows),
        controls=verdict.controls(rows),
        bars=view.bars(rows),
        losses=losses,
        cuts={name: plots for name, plots in cuts.items() if plots},
        scans=scans,
        prompts=[view.marked(item) for item in prompts],
    )


def markdown(
    rows: Sequence[Row], prompts: Sequence[Mapping[str, Any]], facts: RunFacts, trade_offs: Sequence[Plot]
) -> str:
    """The report for a terminal, a README or a model card."""
    parts = [f"# {facts.name}", verdict.verdict(rows), "## Trade-off", tables.markdown_table(rows).rstrip()]
    parts += [f"![{plot.title}](plots/{plot.name}.png)" for plot in trade_offs]
    findings = [gap.text for gap in verdict.gaps(rows)] + verdict.controls(rows)
    for title, lines in (("What training brought", findings), ("Pruning", facts.pruning), ("Notes", facts.notes)):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    parts += [f"## Search of {name}\n\n{_table_markdown(lines)}" for name, lines in facts.searches.items()]
    if facts.measured():
        parts += ["## How it was measured", "\n".join(f"- {label}: {value}" for label, value in facts.measured())]
    if prompts:
        parts.append("## Side by side")
        parts += [_prompt_markdown(item) for item in prompts]
    if facts.recipe:
        parts += ["## Recipe", _fenced(facts.recipe, "yaml")]
    if facts.command:
        parts += ["## Reproduce", _fenced(facts.command, "sh")]
    return "\n\n".join(parts) + "\n"


def _prompt_markdown(item: Mapping[str, Any]) -> str:
    answers = [f"**{name}**\n\n{_fenced(given['text'])}" for name, given in item["answers"].items()]
    return "\n\n".join([f"Prompt:\n\n{_fenced(item['prompt'])}", *answers])


def _table_markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|" + "---:|" * len(lines[0]), *body])


def _fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
