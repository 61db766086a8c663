"""Text from outside, put into Markdown, renders as it was written; compared with a renderer."""

from __future__ import annotations

import random
import re

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from distill.core.markdown import escaped, fenced

RENDERER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
EVIL = (
    "<script>alert('x')</script> & <img src=x onerror=y>",
    "<!-- --> <b>",
    "[click](javascript:alert(1)) ![x](http://x/y.png) <http://x>",
    "a | b | c",
    "**bold** _it_ __b__ *i* ~~gone~~ `code` snake_case_name _x",
    "# heading",
    "+ item",
    "- item",
    "12. item",
    "3) item",
    "line\n\n# another\n| table |\n|---|",
    "```\n<script>",
    "back\\slash \\* \\[x\\](y)",
    "&lt;b&gt; &amp; &#60;",
    "> quote",
    "$x^$ $\\frac{$",
    "~~~",
    "***",
    "-5 % to 3.5, kept as it is: a-b, x.y (z)",
)


def texts(tokens: list[Token]) -> str:
    """What a reader sees of inline content; None of it may be anything but text."""
    found = [child for token in tokens if token.type == "inline" for child in token.children or []]
    assert {child.type for child in found} <= {"text", "text_special"}, [child.type for child in found]
    return "".join(child.content for child in found)


def check(text: str) -> None:
    shown = " ".join(text.split())
    for form, kinds in (
        ("{}", ["paragraph_open", "inline", "paragraph_close"]),
        ("# {}", ["heading_open", "inline", "heading_close"]),
    ):
        tokens = RENDERER.parse(form.format(escaped(text)))
        assert [token.type for token in tokens] == kinds, (text, escaped(text))
        assert texts(tokens) == shown
    item = RENDERER.parse(f"- {escaped(text)}")
    assert [token.type for token in item].count("list_item_open") == 1
    assert [token.type for token in item].count("paragraph_open") == 1
    assert texts(item) == shown
    row = RENDERER.parse(f"| a | b |\n|---|---|\n| {escaped(text)} | end |\n")
    cells = [token for token in row if token.type == "inline"]
    assert len(cells) == 4
    assert texts(cells[2:3]) == shown
    assert cells[3].content == "end"


@pytest.mark.parametrize("text", EVIL)
def test_it_reads_as_it_was_written(text: str) -> None:
    check(text)


def test_whatever_it_holds() -> None:
    dice = random.Random(0)
    pieces = [*re.findall(r"\w+|[^\w\s]|\s", " ".join(EVIL)), "0", "\t", "é", "](", "<a>"]
    for _ in range(2000):
        text = "".join(dice.choices(pieces, k=dice.randrange(1, 9)))
        if text.strip():
            check(text)


@pytest.mark.parametrize("text", [*EVIL, "````", "a\n```\nb\n`````\nc"])
def test_a_fence_holds_what_is_in_it(text: str) -> None:
    (token,) = RENDERER.parse(fenced(text, "yaml"))
    assert (token.type, token.info, token.content) == ("fence", "yaml", f"{text.rstrip()}\n")
