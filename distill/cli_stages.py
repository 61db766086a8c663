"""Verbs of the command line that run one stage without a recipe file."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.core.errors import InputError
from distill.core.unattended import unattended

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a Hub id, or builtin:quickstart-teacher.")]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Text: a folder, a .jsonl, .csv, .parquet or .txt file, or a data set of the Hub."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of the stage, such as group_size=64, or of the recipe, such as compute.devices=2.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder of the run; unset: runs/<model>-<stage>.")]


def prune(
    model: Model,
    keep: Annotated[
        list[str],
        typer.Option("--keep", metavar="KEY=SIZE", help="A size to keep, such as intermediate_size=50%; repeatable."),
    ],
    text: Text = None,
    set: Set = None,
    out: Out = None,
) -> None:
    """Prune a model to a smaller model, as the stage prune does; the text is for calibration."""
    sizes = {}
    for one in keep:
        key, equals, size = one.partition("=")
        if not equals:
            raise InputError(f"--keep {one}: expected KEY=SIZE, such as intermediate_size=50% (see distill list keep)")
        sizes[key] = int(size) if size.isdigit() else size
    _run("prune", model, {"model": "teacher", "keep": sizes}, set, text, out)


def quantize(
    model: Model,
    quantizer: Annotated[
        str, typer.Option(help="The grid of the weights, such as int_group, q4_0, fp8 (see distill list quantizers).")
    ] = "int_group",
    text: Text = None,
    set: Set = None,
    out: Out = None,
) -> None:
    """Round a model to low-bit weights, as the stage quantize does; --set num_tokens=1e6 trains them."""
    stage = {"student": "teacher", "quantizer": {"kind": quantizer}, "num_tokens": 0}
    if any(one.startswith(("num_tokens=", "num_steps=")) for one in set or []):
        del stage["num_tokens"]
    _run("quantize", model, stage, _of_quantizer(set or []), text, out)


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models; the first is the teacher.")],
    text: Text = None,
    speed: Annotated[bool, typer.Option(help="Measure speed and memory too.")] = True,
    set: Set = None,
    out: Out = None,
) -> None:
    """Measure models on the same held-out text, as the stage evaluate does; the others are compared with the first."""
    first, *others = models
    stage: dict[str, Any] = {"models": ["teacher", *others]} | ({} if speed else {"speed": None})
    _run("evaluate", first, stage, set, text, out)


def export(
    model: Model,
    target: Annotated[
        str, typer.Option(help="The format: huggingface, gguf, onnx or torchao (see distill list exporters).")
    ] = "huggingface",
    text: Text = None,
    set: Set = None,
    out: Out = None,
) -> None:
    """Export a model for an engine and verify the file in this engine, as the stage export does."""
    title = re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/:]", model.rstrip("/"))[-1]).strip("-._") or "model"
    stage = {"model": "teacher", "target": {"kind": target}, "title": f"{title[:80]}-{target}"}
    _run("export", model, stage, set, text, out)


VERBS = (prune, quantize, evaluate, export)


def _run(
    kind: str, model: str, stage: dict[str, Any], settings: list[str] | None, text: str | None, out: Path | None
) -> None:
    with unattended():
        from distill.one_stage import recipe_of, run_stage

        recipe = recipe_of(kind, model, stage, settings or [], text=text)
        run_stage(recipe, out, shlex.join(["distill", *sys.argv[1:]]))


GRID_KEYS = ("bits", "group_size", "symmetric", "scale", "skip", "include")


def _of_quantizer(settings: list[str]) -> list[str]:
    """Keys of the grid may be given without the name of the section in front."""
    return [f"quantizer.{one}" if one.partition("=")[0] in GRID_KEYS else one for one in settings]
