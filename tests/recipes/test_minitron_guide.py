"""The guide to a Minitron student: its commands are valid, and its computed figures follow from the recipes."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.forecast import describe
from distill.models.layouts import layout_for
from distill.pruning.select import target_sizes
from distill.recipe import Recipe

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "minitron.md").read_text(encoding="utf-8")
COMMANDS = [line for line in GUIDE.splitlines() if line.startswith("distill run ")]
TEACHER = "meta-llama/Llama-3.1-8B"
MULTIPLYING = r"(\d\.\d{3})B for the teacher, (\d\.\d{3})B for the width student,\s(\d\.\d{3})B for the\sdepth student"
FLOPS_PER_HOUR = 0.35 * 989e12 * 3600
"""As the guide assumes."""


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_valid(command: str, real_config: Callable[[str], Path]) -> None:
    words = shlex.split(command)
    settings = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    recipe = Recipe.load(ROOT / "recipes" / f"{words[2]}.yaml", set=[*settings, f"teacher={real_config(TEACHER)}"])
    assert "] distill: reads prune" in describe(recipe)


def test_there_are_commands_and_their_folders_differ() -> None:
    folders = [shlex.split(command)[4] for command in COMMANDS]
    assert len(set(folders)) == len(folders) >= 4


def test_its_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", GUIDE) if not link.startswith("https://")]
    assert [link for link in links if not (ROOT / "docs" / link).resolve().is_file()] == []
    assert links


SHARDED = ("compute.devices=2", "compute.strategy=fsdp")


@pytest.mark.parametrize(
    ("settings", "cached", "gigabytes", "said"),
    [
        ((), False, "96.2", "One GPU with 141 GB for the recipe as it is"),
        (("stages.distill.lora={r: 256}",), False, "45.5", "the last row fits into 80 GB (`check`: 45.5 GB)"),
        (("compute.devices=1", "compute.teacher_device=cuda:1"), False, "81.2", "need 81.2 GB in total"),
        (SHARDED, False, "53.4", "53.4 GB each with the teacher"),
        (SHARDED, True, "46.4", "46.4 GB each from a cache of its hidden states"),
    ],
)
def test_its_memory_is_what_check_says(
    settings: tuple[str, ...], cached: bool, gigabytes: str, said: str, real_config: Callable[[str], Path]
) -> None:
    text = (ROOT / "recipes" / "llama-3.1-8b-to-4b-width.yaml").read_text(encoding="utf-8")
    if cached:
        cache = "  cache: {kind: cache_teacher, teacher: corrected_teacher, codec: hidden}\n  distill:"
        text = text.replace("\n  distill:", f"\n{cache}")
        settings = (*settings, "stages.distill.teacher=cache", "data.train.streaming=false")
    teacher = real_config(TEACHER)
    config = json.loads((teacher / "config.json").read_text()) | {"dtype": "bfloat16"}  # as the Hub has it
    (teacher / "config.json").write_text(json.dumps(config))
    settings = (*settings, f"teacher={teacher}", "compute.accelerator=gpu")
    plan = describe(Recipe.from_text(text, set=settings), 80)
    assert f"memory of a GPU: {gigabytes} GB" in plan.split("] distill")[1]
    assert said in " ".join(GUIDE.split())
    assert "a checkpoint is 54.2 GB, up to 3 on disk at a time" in plan or "lora={r: 256}" in settings[0]
    assert "up to three checkpoints of 54 GB" in GUIDE


def _multiplying(real_config: Callable[[str], Path], name: str | None) -> int:
    """Parameters that multiply: all but the input embedding, which is as large as the head."""
    config = json.loads((real_config(TEACHER) / "config.json").read_text())
    if name is not None:
        keep = Recipe.load(ROOT / "recipes" / f"{name}.yaml").stages["prune"].keep  # type: ignore[attr-defined]
        layout = layout_for(config["model_type"])
        kept = target_sizes(keep, config, layout)
        config |= {"hidden_size": kept["hidden_channels"], "intermediate_size": kept["mlp_neurons"]}
        config |= {"num_hidden_layers": kept["layers"], "head_dim": 128}
    return layout_for(config["model_type"]).count(config) - config["vocab_size"] * config["hidden_size"]


def test_its_hours_follow_from_the_recipes(real_config: Callable[[str], Path]) -> None:
    students = ("llama-3.1-8b-to-4b-width", "llama-3.1-8b-to-4b-depth")
    teacher, width, depth = (_multiplying(real_config, name) for name in (None, *students))
    said = re.search(MULTIPLYING, GUIDE)
    assert said is not None
    assert [f"{count / 1e9:.3f}" for count in (teacher, width, depth)] == list(said.groups())
    flops = [4 * teacher, 2 * teacher + 6 * width, 2 * teacher + 6 * depth]
    rows = re.findall(r"^\| ([\d.]+)B \| ([\d,]+) h \| ([\d,]+) h \| ([\d,]+) h \|", GUIDE, re.MULTILINE)
    assert len(rows) >= 4
    for tokens, *hours in rows:
        assert hours == [f"{float(tokens) * 1e9 * one / FLOPS_PER_HOUR:,.0f}" for one in flops]
