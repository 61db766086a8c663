"""Text from several columns: what a template writes, what it may not do, and what it says of rows that do not fit."""

import datetime

import pytest

from distill.data import files
from distill.data.jsonl import Jsonl
from distill.data.message import Unusable
from distill.data.text_template import TextOf

ROW = {
    "title": "A",
    "body": "b {{ x }}",
    "tags": ["p", "q"],
    "n": 3,
    "day": datetime.date(2026, 1, 2),
    "full text": "F",
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ title }}\n\n{{ body }}\n", "A\n\nb {{ x }}\n"),  # what a column holds is no template
        ("{{ title | lower }}{% if n > 2 %}!{% endif %}", "a!"),
        ("{{ tags | join(', ') }}: {{ tags | length }}", "p, q: 2"),
        ("{% for tag in tags %}{{ loop.index }}{{ tag }};{% endfor %}", "1p;2q;"),
        ("{{ row['full text'] }} {{ n }} {{ day }}", "F 3 2026-01-02"),
        ("{{ missing | default('none') }}", "none"),
        ("{% if missing is defined %}{{ missing }}{% else %}-{% endif %}", "-"),
        ("{{ title ~ '/' ~ n }}{{ tags | tojson }}", 'A/3["p", "q"]'),
        ("{{ body | replace('{', '(') }}", "b (( x }}"),
    ],
)
def test_writes(template, text):
    assert TextOf(template)(ROW) == text


@pytest.mark.parametrize(
    ("template", "row", "reason", "detail"),
    [
        ("{{ title }}{{ x }}", ROW, "no such column", "no column 'x' (it has 'title', 'body'"),
        ("{{ title.x }}", ROW, "no text", "has no attribute 'x'"),
        ("{{ title }}", {"title": None}, "a null", "column 'title' holds none; write {{ title or '' }}"),
        ("{{ tags }}", ROW, "wrong type", "writes a list; make it text with | join(', ')"),
        ("{{ row }}", ROW, "wrong type", "writes a dict; make it text with | tojson"),
        ("{{ row.items }}", ROW, "wrong type", "which is no text"),
        ("{{ title.upper }}", ROW, "wrong type", "which is no text"),
        ("{{ n + title }}", ROW, "no text", "unsupported operand"),
        ("{{ 1 / (n - 3) }}", ROW, "no text", "division by zero"),
        ("{{ title }}", ["a"], "not an object", "got list"),
        ("{{ title }}", {"title": "\ud800"}, "not text", "surrogate"),
        ("title", {"title": 3}, "wrong type", "column 'title' must hold a string (got int)"),
    ],
)
def test_says_what_is_wrong_with_a_row(template, row, reason, detail):
    with pytest.raises(Unusable) as error:
        TextOf(template)(row)
    assert (error.value.reason, detail in error.value.detail) == (reason, True), error.value.detail


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ title", "line 1 of the template: "),
        ("a\n{% for %}", "line 2 of the template: "),
        ("{{ title | bold }}", "No filter named 'bold'"),
        ("{{ title.__class__.__mro__ }}{{ title.upper() }}", "a call"),
        ("{{ range(10) }}", "a call"),
        ("{{ 'a' * 10**10 }}", "*"),
        ("{{ '%9999999999d' % n }}", "%"),
        ("{% macro m() %}{% endmacro %}", "a macro"),
        ("{% include '/etc/passwd' %}", "include"),
        ("{% import 'x' as y %}{{ y }}", "import"),
        ("{% extends 'x' %}", "extends"),
        ("{{ (" + "(" * 5000 + "title" + ")" * 5001 + " }}", "nested too deep"),
    ],
)
def test_refuses_a_template_that_does_more_than_write_columns(template, why):
    with pytest.raises(ValueError, match="template") as error:
        Jsonl(path="x.jsonl", text=template)
    assert why in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in tags %}{% for b in tags %}{{ body }}{% endfor %}{% endfor %}",
        "{{ tags | join(body) }}",
        "{{ body | replace('b', body) }}",
    ],
)
def test_a_text_that_grows_without_bound_ends(template, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 100_000)
    row = {"tags": ["t"] * 1000, "body": "b" * 1000}
    with pytest.raises(Unusable, match=r"the template writes more than 100,000 characters"):
        TextOf(template)(row)


def test_loops_that_write_nothing_end_too(monkeypatch):
    monkeypatch.setattr("distill.data.text_template.MOST_STEPS", 100_000)
    text_of = TextOf("{% for a in body %}{% for b in body %}{% for c in body %}{% endfor %}{% endfor %}{% endfor %}x")
    with pytest.raises(Unusable, match=r"more than 100,000 steps of its loops"):
        text_of({"body": "b" * 10_000})
    assert [text_of({"body": "b" * 45}) for _ in range(3)] == ["x"] * 3  # each row has its own


def test_attributes_of_python_are_out_of_reach():
    for name in ("__class__", "__init__", "__globals__"):
        with pytest.raises(Unusable, match=r"no text|unsafe|undefined|no attribute"):
            TextOf("{{ title." + name + " }}")(ROW)
