"""The report: one page without network, that shows what it was given and nothing else."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from markdown_it import MarkdownIt

from distill.core.errors import MachineError
from distill.reporting import plots
from distill.reporting.tradeoff import Row, from_json
from distill.reporting.write_report import RunFacts, plots_of, write_report

pytestmark = pytest.mark.plots

EVIL = "<script>alert('x')</script> & <img src=x onerror=y>"
ROWS = [
    Row("prune", kind="prune", parent="teacher", weight_bytes=4_600_000, loss_nats=5.9, perplexity=365.0,
        decode_tokens_per_s=610.0, training_tokens=0),
    Row("teacher", "teacher", parameters=4_200_000, non_embedding_parameters=2_100_000, weight_bytes=8_400_000,
        loss_nats=4.06, perplexity=58.0, decode_tokens_per_s=372.0),
    Row("labels", "control", "finetune", "prune", weight_bytes=4_600_000, loss_nats=4.41, perplexity=82.0,
        decode_tokens_per_s=608.0, training_tokens=1000),
    Row("distill", kind="distill", parent="prune", parameters=2_300_000, non_embedding_parameters=900_000,
        weight_bytes=4_600_000, loss_nats=4.24, perplexity=69.4, decode_tokens_per_s=612.0, training_tokens=1000),
    Row("int4", kind="quantize", parent="distill", scheme="int4", kernel="simulated", engine="transformers",
        weight_bytes=1_300_000, loss_nats=4.52, perplexity=91.8, notes=EVIL, training_tokens=0),
]  # fmt: skip
CURVES = {
    "distill": {
        "train/forward_kl": [(100.0 * i, 3.0 / i) for i in range(1, 50)],
        "val/forward_kl": [(1000.0 * i, 2.5 / i) for i in range(1, 5)],
        "train/never": [],
    }
}
PROMPTS = [
    {
        "prompt": EVIL,
        "answers": {
            "teacher": {"text": "return x", "tokens": 2, "seconds": 0.5, "mark": None},
            "distill": {"text": "return <b>y", "tokens": 3, "seconds": 0.25, "mark": [7, 10]},
            "int4": {"text": "return", "tokens": 1, "seconds": None, "mark": [6, 6]},
        },
    }
]
FACTS = RunFacts(
    name="trial", recipe=f"name: trial  # see https://example.org {EVIL}", command="distill run trial.yaml",
    device="CPU", engine="transformers", batch=1, prompt_tokens=128, validation="held out", validation_tokens=41_233,
    pruning=["hidden size 192 to 128"], notes=[EVIL], versions={"torch": "2"},
)  # fmt: skip


class Page(HTMLParser):
    """Collects tags, attributes and the text of marks; complains about tags that do not pair."""

    EMPTY = ("meta", "link", "img", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.marks: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "mark":
            self.marks.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(ROWS, CURVES, PROMPTS, FACTS, tmp_path_factory.mktemp("report")).parent


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def test_all_files_are_there_and_whole(folder: Path) -> None:
    names = {file.name for file in folder.rglob("*") if file.is_file()}
    assert {"index.html", "report.md", "table.csv", "rows.json"} <= names
    assert not [name for name in names if name.endswith(".writing")]
    assert from_json((folder / "rows.json").read_text()) == ROWS
    pictures = plots_of(folder)
    assert set(pictures) == {
        "perplexity_against_weight_bytes",
        "perplexity_against_decode_tokens_per_s",
        "curve_distill_forward_kl",
    }
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in pictures.values())


def test_the_page_parses_and_needs_no_network(html: str) -> None:
    page = Page(html)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert not re.match(r"\s*(https?:|//|data:|javascript:)", value or ""), (tag, name, value)
            if name in {"href", "src", "xlink:href"}:
                assert (value or "").startswith("#")
    assert not re.search(r"@import|url\((?!#)", html)
    assert html.count("https://") == 1  # the one in the recipe's text


def test_ids_are_unique(html: str) -> None:
    """Two plots in one page must not clip each other."""
    page = Page(html)
    plots: list[set[str]] = []
    for tag, attributes in page.tags:
        if tag == "svg":
            plots.append(set())
        elif (
            tag in {"clippath", "path"}
            and attributes.get("id")
            and plots
            and not str(attributes["id"]).startswith("patch")
        ):
            plots[-1].add(str(attributes["id"]))
    assert len(plots) == 3
    assert not plots[0] & plots[1]
    assert not plots[0] & plots[2]


def test_everything_from_outside_is_escaped(html: str) -> None:
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "return <b>y" not in html
    assert html.count("&lt;script&gt;alert") == 4  # prompt, recipe, note, row


def test_the_first_differing_token_is_marked(html: str) -> None:
    assert Page(html).marks == ["<b>", "stops here"]


def test_words_and_figures(html: str) -> None:
    text = re.sub(r"<[^>]+>", "", html)
    assert "43 % of the teacher&#39;s non-embedding parameters" in text
    assert "distill is 0.170 better than labels" in text
    assert text.index("teacher", text.index("Trade-off")) < text.index("prune", text.index("Trade-off"))
    assert "simulated" in text
    assert "41,233 tokens" in text
    assert "hidden size 192 to 128" in text
    assert "int4: simulated here, so without a speed." in text
    assert "prefers-color-scheme: dark" in html
    assert "var(--accent)" in html
    assert "#01020" not in html


def test_markdown_and_csv(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# trial\n")
    assert "| teacher |" in text
    assert "```yaml" in text
    assert (folder / "table.csv").read_text().count("\n") == len(ROWS) + 1


def test_markdown_renders_nothing_from_outside(tmp_path: Path) -> None:
    evil = f"{EVIL} [x](javascript:alert(1)) **y** | z\n\n# heading\n```"
    rows = [replace(ROWS[1], name="the | teacher", device=evil)]
    rows += [
        replace(row, name=f"{evil} {row.name}", parent=rows[0].name, notes=evil)
        for row in ROWS
        if row.role == "student"
    ]
    facts = RunFacts(
        name=evil, recipe=evil, command=evil, device=evil, engine=evil, validation=evil, pruning=[evil], notes=[evil],
        searches={"prune": [["a", "b"], [evil, evil]]}, versions={"torch": evil},
    )  # fmt: skip
    prompts = [{"prompt": evil, "answers": {evil: {"text": evil, "tokens": 1, "seconds": 1.0, "mark": None}}}]
    write_report(rows, CURVES, prompts, facts, tmp_path)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse((tmp_path / "report.md").read_text())
    assert {token.type for token in tokens if "html" in token.type} == set()
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {
        "text",
        "text_special",
        "softbreak",
        "strong_open",
        "strong_close",
        "image",
    }
    assert {str(child.attrs["src"]) for child in inline if child.type == "image"} <= {
        f"plots/{name}.png" for name in plots_of(tmp_path)
    }
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert "heading" not in headings
    rows_of_tables = [token for token in tokens if token.type == "tr_open"]
    assert len(rows_of_tables) == 1 + len(rows) + 2


@pytest.mark.parametrize(
    "rows", [[], [Row("only")], [ROWS[1]], [Row("bad", loss_nats=math.nan, perplexity=math.inf), ROWS[1]]]
)
def test_poor_runs_still_get_a_page(rows: list[Row], tmp_path: Path) -> None:
    page = write_report(rows, {}, [], RunFacts("poor"), tmp_path / "new")
    assert Page(page.read_text(encoding="utf-8")).open == []


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(ROWS[:2], {}, [], RunFacts("old"), tmp_path)
    before = (tmp_path / "index.html").read_bytes()
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("index.html"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MachineError, match="No space left"):
        write_report(ROWS, {}, [], RunFacts("new"), tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before


def test_drawn_twice_is_the_same(folder: Path, tmp_path: Path) -> None:
    again = write_report(ROWS, CURVES, PROMPTS, FACTS, tmp_path)
    assert again.read_bytes() == (folder / "index.html").read_bytes()


def test_the_line_of_the_cut_spares_dropped_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from matplotlib.figure import Figure

    from distill.reporting import score_plots as module

    drawn: list[Figure] = []

    def render(name: str, size: tuple[float, float], draw: Any, title: str, note: str) -> tuple[str, bytes]:
        assert title == "prune: scores of MLP neurons"
        drawn.append(Figure(figsize=size))
        draw(drawn[0].add_subplot())
        return "", b""

    monkeypatch.setattr(module, "render", render)
    scores: Any = SimpleNamespace(tensors=lambda: {"mlp_neurons": torch.rand(4, 100)})
    plan: Any = SimpleNamespace(
        layers=(0, 3), mlp_neurons=[range(40)] * 2, before={"layers": 4, "mlp_neurons": 100}, after={"mlp_neurons": 40}
    )
    (plot,) = module.score_plots("prune", scores, plan)
    assert "struck through: removed layers" in plot.note
    axes = drawn[0].axes[0]
    cut, struck = [[[tuple(end) for end in line] for line in one.get_segments()] for one in axes.collections]
    assert cut == [[(40, -0.5), (40, 0.5)], [(40, 2.5), (40, 3.5)]]
    assert struck == [[(0, 1), (100, 1)], [(0, 2), (100, 2)]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "the layer's best",
        "a tenth",
        "1/100 or less",
    ]


def test_a_picture_alone_has_title_and_note() -> None:
    def pixels(*said: str) -> tuple[int, int]:
        svg, png = plots.render("x", (3.0, 2.0), lambda axes: None, *said)
        assert "what it shows" not in svg  # the page says it beside it
        return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])

    (width, bare), (same, tall) = pixels(), pixels("what it shows", "word " * 30)
    assert (width, bare) == (660, 440)
    assert same == width
    assert tall > bare + 50
