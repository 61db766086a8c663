"""A recipe's text: scalars, lines, mistakes and ``--set``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.core.errors import InputError, RecipeError
from distill.core.mistakes import blamed
from distill.core.source import DEEPEST, MOST_BYTES, MOST_VALUES, parse, read, suggest

NO_STAGE = "; --set cannot add a stage, so write it into the recipe"


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml").overridden(overrides)
    return caught.value.mistakes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E-5", 5e-5),
        ("2.5e+1", 25),
        (".5", 0.5),
        ("-1.5", -1.5),
        ("2e9", 2_000_000_000),
        ("1_000", 1000),
        ("0x10", 16),
        ("010", 10),
        ("+3", 3),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("[1e-4, on]", [1e-4, "on"]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    got = parse(f"key: {text}", "r.yaml").data["key"]
    assert got == value
    assert type(got) is type(value)


def test_a_float_that_is_whole_becomes_an_int_only_where_that_is_exact() -> None:
    assert type(parse("key: 2e9", "r.yaml").data["key"]) is int
    assert type(parse("key: 1e300", "r.yaml").data["key"]) is float


def test_every_value_knows_its_line() -> None:
    source = parse("a: 1\nb:\n  c: 2\n  d:\n    - x\n    - {e: 3}\n", "r.yaml")
    places = {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "d"): 4, ("b", "d", 0): 5, ("b", "d", 1, "e"): 6}
    assert {path: source.place(path) for path in places} == {path: f"r.yaml:{line}" for path, line in places.items()}


def test_what_is_not_there_has_the_place_of_its_parent() -> None:
    source = parse("a: 1\nb:\n  c: 2\n", "r.yaml")
    assert source.place(("b", "missing", 0)) == "r.yaml:2"
    assert source.place(("missing",)) == "r.yaml:1"


def test_duplicate_keys_are_mistakes_each_at_its_line() -> None:
    assert mistakes("a: 1\nb: {c: 1, c: 2}\na: 3\n") == [
        "r.yaml:2: b.c: written twice",
        "r.yaml:3: a: written twice",
    ]


@pytest.mark.parametrize("tag", ["!!python/object:os.system", "!!binary", "!mine", "!!timestamp", "!!set"])
def test_unknown_tags_are_refused(tag: str) -> None:
    (line,) = mistakes(f"a: 1\nb: {tag} x\n")
    assert line.startswith("r.yaml:2: not valid YAML: values of type ")


def test_nothing_is_put_in_the_place_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "elsewhere")
    odd = ("$PLACE", "${PLACE}", "${oc.env:PLACE}", "%(PLACE)s", "{{ PLACE }}", "torch.optim.AdamW")
    for text in odd:
        assert parse(f"a: '{text}'\n", "r.yaml").data == {"a": text}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1\nb: 2\n", 2),
        ("a: 1\n  b: 2\n", 2),
        ("a: 1\n---\nb: 2\n", 2),
        ("a: *nothing\n", 1),
        ("a: 1\n? [x, y]\n: 2\n", 2),
    ],
)
def test_broken_yaml_is_one_line_with_its_place(text: str, line: int) -> None:
    (message,) = mistakes(text)
    assert message.startswith(f"r.yaml:{line}: not valid YAML: ")
    assert "\n" not in message


@pytest.mark.parametrize("text", ["[1, 2]", "word", "3"])
def test_a_recipe_is_a_mapping(text: str) -> None:
    (message,) = mistakes(text)
    assert message.startswith("r.yaml:1: a recipe is a mapping of keys to values (got ")


def test_an_alias_stands_for_its_value() -> None:
    source = parse("a: &x {lr: 1e-4}\nb: *x\n", "r.yaml")
    assert source.data["b"] == {"lr": 1e-4}
    source.data["b"]["lr"] = 1
    assert source.data["a"] == {"lr": 1e-4}


def test_an_alias_of_itself_is_refused() -> None:
    (message,) = mistakes("a: &x [*x]\n")
    assert "nested" in message


def test_aliases_of_aliases_do_not_fill_the_memory() -> None:
    """Nine lines that stand for a thousand million values."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    (message,) = mistakes(bomb)
    assert f"more than {MOST_VALUES:,} values" in message


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 200_000,
        "a: " + "{a: " * 4_000,
        "- " * 4_000,
        "? " * 4_000,
        "\n".join(" " * depth + "a:" for depth in range(1_000)),
        "a: " + "[" * sys.getrecursionlimit() + "]" * sys.getrecursionlimit(),
    ],
    ids=lambda text: text[:6].replace("\n", "|"),
)
def test_nothing_is_read_beyond_the_deepest_nesting(text: str) -> None:
    """PyYAML's time would grow with the square of the depth, until its recursion ends in an error of Python."""
    assert mistakes(text) == [f"r.yaml:1: not valid YAML: nested more than {DEEPEST} deep"]


def test_nothing_is_read_beyond_the_most_values() -> None:
    text = "a:\n" + "- x\n" * 3 * MOST_VALUES + "]"  # the mistake at the end is not come to
    assert mistakes(text) == [f"r.yaml:1: not valid YAML: more than {MOST_VALUES:,} values"]


def test_a_file_that_is_larger_than_any_recipe_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text("a: " + "x" * MOST_BYTES)
    with pytest.raises(InputError, match=r"larger than 1,048,576 bytes, which no recipe is; name a recipe's file"):
        read(tmp_path / "large.yaml")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    odd = {tmp_path / "pipe.yaml": "a named pipe", Path("/dev/zero"): "a device", tmp_path: "a folder"}
    for file, what in odd.items():
        with pytest.raises(InputError, match=f"is {what}, expected a regular file"):
            read(file)


RECIPE = """\
stages:
  distill:
    num_steps: 10
    losses:
      - forward_kl
      - {kind: cross_entropy, weight: 0.5}
  evaluate:
"""


def override(*texts: str) -> Any:
    return parse(RECIPE, "r.yaml").overridden(texts)


def test_set_changes_a_nested_value_and_its_place() -> None:
    source = override("stages.distill.num_steps=2e3")
    assert source.data["stages"]["distill"]["num_steps"] == 2000
    assert source.place(("stages", "distill", "num_steps")) == "--set"


def test_set_makes_what_is_not_there_yet() -> None:
    source = override("stages.distill.optimizer.lr=1e-4", "stages.evaluate.speed=null", "seed=3")
    assert source.data["stages"]["distill"]["optimizer"] == {"lr": 1e-4}
    assert source.data["stages"]["evaluate"] == {"speed": None}
    assert source.data["seed"] == 3


@pytest.mark.parametrize("address", ["cross_entropy", "1"])
def test_set_finds_a_list_item_by_kind_or_index(address: str) -> None:
    source = override(f"stages.distill.losses.{address}.weight=2")
    assert source.data["stages"]["distill"]["losses"] == ["forward_kl", {"kind": "cross_entropy", "weight": 2}]


def test_set_gives_settings_to_a_bare_kind() -> None:
    source = override("stages.distill.losses.forward_kl.temperature=2")
    assert source.data["stages"]["distill"]["losses"][0] == {"kind": "forward_kl", "temperature": 2}


def test_set_replaces_a_whole_value_and_takes_yaml() -> None:
    source = override("stages.distill.losses=[reverse_kl, {kind: cross_entropy}]")
    assert source.data["stages"]["distill"]["losses"] == ["reverse_kl", {"kind": "cross_entropy"}]
    assert source.place(("stages", "distill", "losses", 0)) == "--set"


def test_the_last_set_wins_and_a_value_may_hold_an_equals_sign() -> None:
    assert override("name=a", "name=b=c").data["name"] == "b=c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed", "--set seed: write it as key.sub=value"),
        ("=3", "--set =3: write it as key.sub=value"),
        (
            "stages.distil.num_steps=1",
            "--set stages.distil.num_steps: there is no stages.distil to set; did you mean 'distill'?",
        ),
        ("stages.new={kind: prune}", "--set stages.new: there is no stages.new to set" + NO_STAGE),
        ("stages.new.kind=prune", "--set stages.new.kind: there is no stages.new to set" + NO_STAGE),
        (
            "stages.distill.losses.forwrd_kl.weight=1",
            "--set stages.distill.losses.forwrd_kl.weight: there is no stages.distill.losses.forwrd_kl to set",
        ),
        (
            "stages.distill.losses.2.weight=1",
            "--set stages.distill.losses.2.weight: there is no stages.distill.losses.2 to set",
        ),
        (
            "stages.distill.num_steps.x=1",
            "--set stages.distill.num_steps.x: there is no stages.distill.num_steps.x to set",
        ),
        ("seed=[1", "--set seed: the value '[1' is not valid YAML (expected ',' or ']', but got '<stream end>')"),
        ("seed={a: 1, a: 2}", "--set seed:1: a: written twice"),
        ("a" + ".a" * 5000 + "=1", "--set: a key of 5001 parts, expected at most 50"),
        (
            "stages.distill.losses.\u00b2.weight=1",
            "--set stages.distill.losses.\u00b2.weight: there is no stages.distill.losses.\u00b2 to set",
        ),
        (
            f"stages.distill.losses.{'9' * 5000}.weight=1",
            f"--set stages.distill.losses.{'9' * 5000}.weight: there is no stages.distill.losses.{'9' * 5000} to set",
        ),
    ],
)
def test_what_set_cannot_do_it_says(text: str, message: str) -> None:
    assert mistakes(RECIPE, text) == [message]


def test_all_mistakes_come_at_once() -> None:
    assert len(mistakes("a: 1\na: 2\n", "b", "a.b.c=1")) == 3


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such recipe"):
        read(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as text"):
        read(tmp_path / "binary.yaml")


def test_suggest() -> None:
    assert suggest("temprature", ["temperature", "weight"]) == "; did you mean 'temperature'?"
    assert suggest("xyz", ["temperature", "weight"]) == ""
    assert suggest(3, ["temperature"]) == ""
    assert suggest("name", (f"a{i}" for i in range(10**9))) == "", "so many are not looked at"


def test_the_override_to_blame_is_looked_for_only_where_there_is_one() -> None:
    """Each look validates the whole recipe again."""
    looks: list[list[str]] = []

    def mistakes_with(some: list[str]) -> list[str]:
        looks.append(some)
        return ["r.yaml:1: of the file"] + ["r.yaml:2: made"] * ("b=1" in some)

    assert blamed(["r.yaml:1: of the file"], [], mistakes_with) == ["r.yaml:1: of the file"]
    assert blamed(["--set a: wrong"], ["a=1"], mistakes_with) == ["--set a: wrong"]
    assert looks == []
    assert blamed(["r.yaml:1: of the file"], ["a=1"] * 1000, mistakes_with) == ["r.yaml:1: of the file"]
    assert looks == [[]]
    assert blamed(["r.yaml:2: made"], ["a=1", "b=1"], mistakes_with) == ["--set b: r.yaml:2: made"]
    looks.clear()
    (line,) = blamed(["r.yaml:2: made"], ["b=1"] * 1000, mistakes_with)
    assert line.endswith("--set b: r.yaml:2: made")
    assert len(looks) == 1
