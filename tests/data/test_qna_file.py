"""qna.yaml: what is read of each version, and the line of each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.core.errors import InputError, RecipeError
from distill.data.qna_file import check_contexts, parse_qna, read_qna

CONTEXT = """\
  - context: |
      The bridge number {n} was built in 19{n}0
      by a company of {n} people.
    questions_and_answers:
      - {{question: "When was bridge {n} built?", answer: In 19{n}0.}}
      - {{question: "Who built bridge {n}?", answer: A company of {n} people.}}
      - question: How many built bridge {n}?
        answer: |
          {n} people.
"""
KNOWLEDGE = """\
version: 3
created_by: somebody
domain: bridges
document_outline: The bridges of a town
document:
  repo: https://example.org/bridges
  commit: abc
  patterns: [bridges.md]
seed_examples:
""" + "".join(CONTEXT.format(n=n) for n in range(1, 6))
SKILL = """\
created_by: somebody
seed_examples:
  - question: "Say 1"
    answer: "1"
    context: one
"""


def mistakes(text: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        parse_qna(text, "qna.yaml")
    return error.value.mistakes


def test_knowledge_of_version_3() -> None:
    qna = parse_qna(KNOWLEDGE, "qna.yaml")
    assert (qna.version, qna.kind, qna.domain, qna.outline) == (3, "knowledge", "bridges", "The bridges of a town")
    assert qna.origin is not None
    assert qna.origin.patterns == ("bridges.md",)
    assert len(qna.seeds) == 5
    assert len(qna.pairs) == 15
    assert qna.pairs[2].answer == "1 people."
    assert qna.pairs[2].place == "qna.yaml:16"
    assert qna.seeds[1].place == "qna.yaml:19"


def test_skills_of_all_versions_and_old_knowledge() -> None:
    first = parse_qna(SKILL, "qna.yaml")
    assert (first.version, first.kind, first.seeds[0].context) == (1, "skill", "one")
    seeds = "".join(f"  - {{question: Say {n}, answer: It is {n}}}\n" for n in range(5))
    for version in (2, 3):
        text = f"version: {version}\ncreated_by: me\ntask_description: Say it\nseed_examples:\n{seeds}"
        qna = parse_qna(text, "qna.yaml")
        assert (qna.version, qna.kind, qna.outline, len(qna.pairs)) == (version, "skill", "Say it", 5)
    old = f"version: 2\ncreated_by: me\ndomain: d\ntask_description: t\nseed_examples:\n{seeds}document: {{repo: r, "
    assert parse_qna(old + "commit: c, patterns: [a.md]}\n", "q").kind == "knowledge"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("version: 3", "version: 4"), "qna.yaml:1: version: must be 1, 2 or 3 (got 4)"),
        (("domain: bridges", "domain: 7"), "qna.yaml:3: domain: needs a text (got 7); put it in quotes"),
        (("domain: bridges", "domian: bridges"), "qna.yaml:3: domian: no such key here"),
        (("answer: In 1910.", "answer: ''"), "seed_examples.0.questions_and_answers.0.answer: is empty"),
        (("question: \"Who built bridge 1?\", ", ""), "seed_examples.0.questions_and_answers.1: question is missing"),
        (("document_outline: The bridges of a town\n", ""), "qna.yaml:1: document_outline is missing"),
        (("[bridges.md]", "bridges.md"), "qna.yaml:8: document.patterns: needs a list of globs"),
        (('"Who built bridge 2?", answer: A company of 2 people', '"When was bridge 2 built?", answer: In 1920'),
         "qna.yaml:24: seed_examples.1.questions_and_answers.1: the same as number 1"),
        ((CONTEXT.format(n=5), ""), "qna.yaml:9: seed_examples: 4 examples, version 3 needs 5 or more"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_line(change: tuple[str, str], said: str) -> None:
    assert change[0] in KNOWLEDGE
    assert any(said in line for line in mistakes(KNOWLEDGE.replace(*change))), mistakes(KNOWLEDGE.replace(*change))


def test_all_mistakes_are_told_at_once_and_yaml_is_safe(tmp_path: Path) -> None:
    assert len(mistakes(KNOWLEDGE.replace("domain: bridges\n", "").replace("version: 3", "version: 9"))) == 2
    assert mistakes("a: !!python/object:os.system x")[0].startswith("qna.yaml:1: not valid YAML")
    assert mistakes("created_by: a\n  b: c\n")[0].startswith("qna.yaml:2: not valid YAML")
    file = tmp_path / "qna.yaml"
    file.write_bytes(SKILL.encode() + b"\n\xff")
    with pytest.raises(InputError, match=r"qna\.yaml:7: not UTF-8"):
        read_qna(file)
    with pytest.raises(InputError, match="no such file"):
        read_qna(tmp_path / "none.yaml")


def test_a_context_that_is_not_in_the_document_is_a_warning() -> None:
    qna = parse_qna(KNOWLEDGE, "qna.yaml")
    text = " ".join(seed.context or "" for seed in qna.seeds[:4]).replace("\n", "   ").upper()
    assert list(check_contexts(qna, [text])) == [
        "qna.yaml:46: this context is not in the documents; were they changed since it was written?"
    ]
