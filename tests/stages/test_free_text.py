"""Whatever people write where a recipe takes any text, and whatever folders are called, no run ends in a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from distill.core.errors import InputError, RecipeError
from distill.forecast import describe
from distill.recipe import Recipe
from distill.runner import run

ODD = {
    "formulas and markup": "a $x^$ \\frac{$ <script>alert(1)<!-- {{ 7*7 }} {% raw %} %s {0} &lt; | `x` **b** ]] \\",
    "controls and scripts": (
        "\u202e\u05d0\u05d1 \U0001f600 \u0436e\u0301 \u2028 \x1b[31m\x07\t'\"; $(id) #~ -rf ..\n---\n- ["
    ),
}


def recipe(teacher: Path, text: Path, odd: str) -> str:
    models = [str(teacher), "tuned", "masked", "cut"]
    stages = {
        "tuned": {"kind": "finetune", "model": "teacher", "num_steps": 1, "batch_size": 2},
        "masked": {"kind": "sparsify", "model": "teacher"},
        "cut": {"kind": "prune", "model": str(teacher), "keep": {"intermediate_size": 32}},
        "evaluate": {"models": models, "teacher": str(teacher), "speed": None},
        "export": {"model": str(teacher), "verify_sequences": 1},
        "report": {"prompts": [odd, "The "], "models": models, "new_tokens": 2},
    }
    data = {"train": {"kind": "jsonl", "path": str(text)}, "sequence_length": 16, "validation_tokens": 100}
    whole = {"name": "tiny", "teacher": str(teacher), "data": data | {"calibration_sequences": 4}, "stages": stages}
    return yaml.safe_dump(
        whole | {"compute": {"accelerator": "cpu"}, "logging": {"wandb": "disabled"}}, sort_keys=False
    )


@pytest.mark.parametrize(
    "kind",
    [first := next(iter(ODD)), *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ODD if kind != first)],
)
def test_a_whole_run_bears_any_text(teacher: Path, text: Path, tmp_path: Path, kind: str) -> None:
    odd = ODD[kind]
    name = odd.replace("/", " ")
    folder = Path(shutil.copytree(teacher, tmp_path / name / name))
    line = {
        "stage": odd,
        "kind": odd,
        "parent": odd,
        "teacher": odd,
        "base_model": odd,
        "licence": odd,
        "input_hash": odd,
    }
    (folder / "distill.json").write_text(json.dumps(line | {"figures": {"scheme": odd}}))
    (folder / "README.md").write_text(f"---\nlicense: {json.dumps(odd)}\n---\n")
    rows = Path(shutil.copy(text, tmp_path / name / "text.jsonl"))
    tiny = Recipe.from_text(recipe(folder, rows, odd))
    describe(tiny)
    done = run(tiny, tmp_path / "run", say=lambda _: None, command=f"distill run {odd}")
    page = (done.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert name.splitlines()[0].split("<")[0].strip() in page.replace("&#39;", "'").replace("&#34;", '"')
    assert (done.folder / "report" / "report.md").is_file()
    (export,) = [place for place in (done.folder / "export").iterdir() if place.is_dir()]
    assert export.name.isascii()
    assert len(export.name) <= 100
    assert (export / "README.md").is_file()


@pytest.mark.parametrize("escape", ["\\ud800", "\\0", "\\uDC00\\uD83D"])
def test_what_is_no_text_is_refused_where_it_is_written(teacher: Path, text: Path, escape: str) -> None:
    odd = recipe(teacher, text, "PROMPT").replace("- PROMPT", f'- "{escape}"')
    with pytest.raises(RecipeError, match=r"recipe:\d+: not valid YAML: holds (half of a surrogate pair|a NUL char)"):
        Recipe.from_text(odd)
    both = Recipe.from_text(recipe(teacher, text, "PROMPT").replace("- PROMPT", '- "\\uD83D\\uDE00"'))
    assert getattr(both.stages["report"], "prompts")[0] == "\U0001f600", "as JSON writes it"  # noqa: B009


def test_a_run_folder_that_is_no_text_is_refused(teacher: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--run-dir '.*\\udcff': is no text in UTF-8"):
        run(Recipe.from_text(recipe(teacher, text, "x")), tmp_path / "\udcff", say=lambda _: None)


def test_a_secret_in_the_command_is_not_written_down(
    teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + "a1b2c3d4" * 4
    monkeypatch.setenv("HF_TOKEN", secret)
    stages = "stages:\n  evaluate: {models: [teacher], speed: null}\n  report: {prompts: []}\n"
    head, _, tail = recipe(teacher, text, "x").partition("stages:")
    tiny = Recipe.from_text(head + stages + tail[tail.index("compute:") :])
    folder = tmp_path / "run"
    run(tiny, folder, say=lambda _: None, command=f"distill run {tmp_path / secret / 'tiny.yaml'}")
    for file in ("report.md", "index.html"):
        written = (folder / "report" / file).read_text()
        assert secret not in written
        assert f"distill run {tmp_path}/***/tiny.yaml" in written


LONG = "x" * 260


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("name: tiny", f"name: {LONG}"), r"recipe:1: name: a name holds .* at most 100 of them"),
        (("  tuned:\n", f"  {LONG}:\n"), r"cannot be the name of a stage \(at most 100 letters, digits, _ and -;"),
        (
            ("  export:\n", f"  export:\n    title: {LONG}\n"),
            r"stages.export.title: a name holds .* at most 100 of them",
        ),
        (
            ("  evaluate:\n", f"  evaluate:\n    controls: [{LONG}]\n"),
            r"controls.0: no earlier stage, folder or Hub id",
        ),
    ],
)
def test_names_that_no_file_could_have_are_refused_when_the_recipe_is_read(
    teacher: Path, text: Path, change: tuple[str, str], line: str
) -> None:
    written = recipe(teacher, text, "x")
    assert change[0] in written
    with pytest.raises(RecipeError, match=line):
        Recipe.from_text(written.replace(*change))


@pytest.mark.parametrize("place", ["/" + "x" * 3000, "~nobody-of-this-name/x", "./" + "a/" * 2500, "org/" + "m" * 300])
def test_paths_that_lead_nowhere_are_one_line(teacher: Path, text: Path, place: str) -> None:
    for old in (f"teacher: {teacher}\n", f"model: {teacher}\n", f"path: {text}\n"):
        written = recipe(teacher, text, "x")
        assert old in written
        key = old.partition(":")[0]
        with pytest.raises(InputError) as refusal:
            describe(Recipe.from_text(written.replace(old, f"{key}: {place}\n")))
        assert all(line.startswith(("tiny: ", "recipe:")) for line in str(refusal.value).splitlines())


def test_a_title_made_of_other_names_is_one_that_a_folder_can_have(teacher: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / f"{'m' * 200} $x$")
    head, _, tail = recipe(teacher, text, "x").partition("stages:")
    stages = f"stages:\n  export: {{model: {json.dumps(str(folder))}, verify_sequences: 1}}\n"
    done = run(Recipe.from_text(head + stages + tail[tail.index("compute:") :]), tmp_path / "run", say=lambda _: None)
    (export,) = [place.name for place in (done.folder / "export").iterdir() if place.is_dir()]
    assert export == f"tiny-{'m' * 200}"[:100]
