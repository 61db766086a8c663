"""The documentation: what it takes from the code is current, its examples are valid, and its links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import distill
from distill.core.errors import RecipeError
from distill.core.listener import DEBOUNCE_S, LEAVE_S, PATIENCE_S
from distill.core.source import parse
from distill.core.spec import Spec
from distill.data.spec import DataSpec
from distill.data.text_template import filters_of_templates
from distill.recipe import Recipe
from distill.stages import STAGES
from distill.training.saver import STEP_S

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "recipes" / "README.md"])
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))


def test_no_page_holds_both_sides_of_a_merge() -> None:
    marks = re.compile(r"^(<<<<<<< |>>>>>>> |=======$)", re.MULTILINE)
    assert [str(page) for page in PAGES if marks.search(page.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(("kind", "spec"), STAGES.items(), ids=list(STAGES))
def test_every_stage_has_a_page_that_is_current(kind: str, spec: type[Spec]) -> None:
    file, wanted = GENERATE["page"](kind, spec)
    assert file.read_text(encoding="utf-8") == wanted, "run: make pages"
    examples = [parse(text, file.name).data for text in re.findall(r"```yaml\n(.*?)```", wanted, re.S)]
    stages = {name: {"kind": name, **stage} for example in examples for name, stage in example["stages"].items()}
    assert kind in [stage["kind"] for stage in stages.values()]
    for stage in stages.values():
        STAGES[stage["kind"]].model_validate(stage)


def test_the_table_of_sources_is_current_and_its_example_valid() -> None:
    file, wanted = GENERATE["sources"]()
    assert file.read_text(encoding="utf-8") == wanted, "run: make pages"
    example = re.findall(r"## Sources.*?```yaml\n(.*?)```", wanted, re.S)[0]
    assert DataSpec.model_validate(parse(example, file.name).data["data"]).drops_rows
    filters = filters_of_templates()
    assert f"{', '.join(f'`{name}`' for name in filters[:-1])} and `{filters[-1]}`;" in " ".join(wanted.split())


def test_the_reference_is_current_and_names_all_that_is_public() -> None:
    stale = [file.name for file, wanted in GENERATE["pages"]() if file.read_text(encoding="utf-8") != wanted]
    assert stale == [], "run: make pages"
    python = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: distill\.(\S+)", python, re.M)}
    specs = {"losses", "pruning", "quantization", "OptimizerSpec", "__version__"}
    assert set(distill.__all__) - specs <= shown


def test_every_page_is_on_the_site() -> None:
    nav = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    pages = {page.relative_to(ROOT).as_posix() for page in [*PAGES, ROOT / "benchmarks" / "README.md"]}
    notebooks = {f"notebooks/{file.stem}.md" for file in (ROOT / "notebooks").glob("*.ipynb")}
    assert nav == pages | notebooks


def test_links_between_pages_lead_to_files_and_headings() -> None:
    dead = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, heading = target.partition("#")
            if "://" in target:
                continue
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (heading and heading not in headings(file)):
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert dead == []


def test_the_readme_shows_a_recipe_and_what_its_mistakes_say() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", readme, re.S)
    assert list(Recipe.from_text(recipe).stages) == ["prune", "distill", "quantize", "evaluate", "export", "report"]
    wrong = recipe.replace("optimizer: {lr: 1e-4}", "lr: 1e-3").replace("evaluate: {}", "evaluate: {modls: []}")
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(wrong, "my.yaml")
    shown = re.findall(r"^my\.yaml:\d+: (.*)$", readme, re.M)
    assert [mistake.split(": ", 1)[1] for mistake in caught.value.mistakes] == shown


def test_the_bounds_of_a_stop_are_those_of_the_code() -> None:
    runs, reliability = (" ".join((ROOT / "docs" / name).read_text().split()) for name in ("runs.md", "reliability.md"))
    assert f"within {PATIENCE_S + LEAVE_S:.0f} seconds even if a library does not react" in runs
    assert f"is interrupted after {PATIENCE_S:.0f} seconds." in reliability
    assert f"has not ended {LEAVE_S:.0f} seconds later is ended" in reliability
    assert f"Each of the two may take {STEP_S / 60:.0f} minutes." in reliability
    assert f"within {DEBOUNCE_S:.0f} second of the first is the same signal" in reliability


def headings(file: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
