"""A card is a stranger's text: its licence is found, or is not stated, whatever else stands there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distill.models.card import licence_of

BOMB = "a0: &a0 [x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))


def read(folder: Path) -> tuple[str | None, list[str]]:
    """The licence, and what was said about it."""
    said: list[str] = []
    licence = licence_of(str(folder), said.append)
    assert all(
        line.count("\n") == 0 and line.startswith(f"{folder / 'README.md'}: the licence cannot") for line in said
    )
    return licence, said


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("license: mit", "mit"),
        ("license: mit  # as ever\nlanguage: en", "mit"),
        ("\"license\": 'cc-by-4.0'", "cc-by-4.0"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license:\n- mit\n- apache-2.0\ntags: []", "mit, apache-2.0"),
        ("license: >\n  my own\n  licence\ntags: []", "my own licence"),
        ("license: null", None),
        ("license:", None),
        ("license_name: other", None),
        ("x:\n  license: mit", None),
        ("- license", None),
        # what stands beside it is nobody's business here
        ("x: [\nlicense: mit", "mit"),
        ("x: !!python/object/apply:os.system [exit]\nlicense: mit", "mit"),
        ("model-index: 5\nlicense: mit", "mit"),
        (BOMB + "license: mit", "mit"),
        ("x: \udcff\udcfe\nlicense: mit", "mit"),
    ],
)
def test_the_licence_is_found_whatever_stands_beside_it(tmp_path: Path, metadata: str, licence: str | None) -> None:
    text = f"---\n{metadata}\n---\n# A model\n"
    (tmp_path / "README.md").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read(tmp_path) == (licence, [])


@pytest.mark.parametrize(
    "metadata",
    [
        "license: {name: mit}",
        "license: [[mit]]",
        "license: [mit",
        BOMB + "license: *a11",
        "license: &a [*a]",
        "license: " + "[" * 3000,
        "license: " + "x" * 201,
        "license:\n" + "- mit\n" * 1000,
        'license: "a\\u001bb"',
        "license: m\udcffit",
        "license: mit\n---\n".replace("---", "no fence"),
    ],
    ids=lambda metadata: ascii(metadata[-12:]),
)
def test_one_that_cannot_be_read_is_said_in_a_line(tmp_path: Path, metadata: str) -> None:
    fence = "" if "no fence" in metadata else "---\n"
    (tmp_path / "README.md").write_bytes(f"---\n{metadata}\n{fence}".encode("utf-8", "surrogateescape"))
    licence, said = read(tmp_path)
    assert licence is None
    assert len(said) == 1


def test_what_is_no_card_states_no_licence(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert read(tmp_path) == (None, [])
    for make in (lambda: card.write_text(""), lambda: card.write_text("# no metadata\n---\nlicense: mit\n---\n")):
        make()
        assert read(tmp_path) == (None, [])
        card.unlink()
    for make in (
        card.mkdir,
        lambda: os.mkfifo(card),
        lambda: card.symlink_to("/dev/zero"),
        lambda: card.symlink_to(card),
    ):
        make()
        assert read(tmp_path) == (None, [])
        (os.rmdir if card.is_dir() else os.unlink)(card)
