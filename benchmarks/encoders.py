"""A real encoder with half its layers, taught by the whole one: classes of questions, with labels alone as control.

all-MiniLM-L6-v2 gets a head for the six classes of TREC's questions, its layers 1, 3 and 5 are kept, and the student
learns from the whole model, or from the labels alone. One model is tuned and cut; the seeds decide the order of rows
and the dropout of both students. The recipe is that of recipes/trec-minilm-3-layers.yaml.

    python -m benchmarks.encoders --model MODEL --data DATA --work WORK

MODEL: folder of all-MiniLM-L6-v2. DATA: folder with `trec/train.txt.gz` and `trec/test.txt.gz` (CLASS:kind question).
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import hardware, result
from distill.core.run_folder import Run
from distill.numerics.statistics import Paired
from distill.recipe import Recipe
from distill.reporting.tradeoff import Row, read_rows
from distill.runner import run

RECIPE = Path(__file__).parents[1] / "recipes" / "trec-minilm-3-layers.yaml"
FIGURES = ("accuracy", "macro_f1", "matthews", "kl_to_teacher", "top1_agreement")


def rows_of_trec(file: Path, to: Path) -> Path:
    """The questions as JSON Lines with the columns ``text`` and ``label``."""
    lines = []
    with gzip.open(file, "rt", encoding="latin-1") as stream:
        for line in stream:
            name, _, text = line.rstrip("\n").partition(" ")
            lines.append(json.dumps({"text": text, "label": name.partition(":")[0]}))
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return to


def recipe(model: Path, data: Path, work: Path, seed: int, *, speed: bool) -> Recipe:
    """The shipped recipe on local files; all seeds but the first begin with the tuned model of the first."""
    changes = [f"seed={seed}", "logging.wandb=disabled", "task.label=label", "require={}"]
    for side, name in (("train", "train"), ("validation", "test")):
        file = rows_of_trec(data / "trec" / f"{name}.txt.gz", work / "data" / f"trec-{name}.jsonl")
        changes.append(f"data.{side}={{kind: jsonl, path: {file}}}")
    if seed:
        model = Path(Run(work / "trec" / "seed-0").model("tune").location)
        changes += ["stages.tune.num_epochs=null", "stages.tune.num_steps=0"]
    if not speed:
        changes.append("stages.evaluate.speed=null")
    return Recipe.load(RECIPE, set=[f"teacher={model}", *changes])


def without(recipe: Recipe, *names: str) -> Recipe:
    """The recipe without some of its stages."""
    return recipe.model_copy(update={"stages": {k: v for k, v in recipe.stages.items() if k not in names}})


def measured(folder: Path) -> dict[str, Row]:
    """Name -> row of a finished run."""
    return {row.name: row for row in read_rows(folder / "evaluate" / "rows.json")}


def answers_of(folder: Path, model: str) -> list[bool]:
    """Whether a model classifies each question rightly."""
    stored = json.loads((folder / "evaluate" / "tasks" / "classification" / f"{model}.json").read_text())
    return [bool(one["right"]) for one in stored["answers"]]


def quality(runs: list[dict[str, Row]]) -> list[dict[str, Any]]:
    """A row per model, over the seeds."""
    rows = []
    for name in ("tune", "prune", "distill", "labels_alone"):
        seeds = runs[:1] if name in ("tune", "prune") else runs
        rows.append(
            {
                "table": "quality",
                "model": name,
                "parameters": seeds[0][name].parameters,
                "seeds": len(seeds),
                **{key: result.spread([float(getattr(one[name], key) or 0.0) for one in seeds]) for key in FIGURES},
            }
        )
    return rows


def differences(runs: list[dict[str, Row]], folders: list[Path]) -> list[dict[str, Any]]:
    """Distillation less labels alone, seed by seed, and what the questions of all seeds show together."""
    pairs = [100 * (one["distill"].accuracy - one["labels_alone"].accuracy) for one in runs]  # type: ignore[operator]
    together = Paired.of(
        [right for folder in folders for right in answers_of(folder, "labels_alone")],
        [right for folder in folders for right in answers_of(folder, "distill")],
    )
    return [
        {
            "table": "difference",
            "points": result.spread(pairs),
            "gained": together.gained,
            "lost": together.lost,
            "p": together.p,
        }
    ]


def speeds(rows: dict[str, Row]) -> list[dict[str, Any]]:
    """A row per export, and per model where its speed was measured: milliseconds at each batch size and length."""
    found = []
    for row in rows.values():
        if not row.speeds and not row.is_file:
            continue
        times = {
            f"ms_{point.batch}_{point.prompt_tokens}": 1e3
            * point.batch
            * point.prompt_tokens
            / point.prefill_tokens_per_s
            for point in row.speeds
        }
        found.append(
            {
                "table": "speed",
                "model": row.name,
                "engine": row.engine,
                "accuracy": row.accuracy,
                "megabytes": (row.weight_bytes or 0) / 1e6,
                **times,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-speed", action="store_true", help="leave out the speed, which needs an idle machine")
    args = parser.parse_args()
    folders = [args.work / "trec" / f"seed-{seed}" for seed in range(args.seeds)]
    for seed, folder in enumerate(folders):
        made = recipe(args.model.resolve(), args.data, args.work, seed, speed=seed == 0 and not args.no_speed)
        run(made if seed == 0 else without(made, "export", "plain", "report"), folder)
    runs = [measured(folder) for folder in folders]
    rows = [*quality(runs), *differences(runs, folders), *speeds(runs[0])]
    for row in rows:
        print({key: round(value["mean"], 4) if isinstance(value, dict) else value for key, value in row.items()})
    teacher = runs[0]["tune"].accuracy or 0.0
    kept = statistics.fmean((one["distill"].accuracy or 0.0) / teacher for one in runs)
    result.write(
        "encoders",
        command="python -m benchmarks.encoders --model MODEL --data DATA --work WORK "
        f"--seeds {args.seeds}{' --no-speed' * args.no_speed}",
        hardware=hardware.describe(1),
        versions=hardware.versions("onnxruntime"),
        rows=[*rows, {"table": "kept", "of_teacher": kept}],
        notes=[
            "The accuracy of a seed has a standard error of about one point (500 questions). The difference of two "
            "students on the same questions is tested in pairs (exact McNemar test, over the questions of all seeds)."
        ],
    )


if __name__ == "__main__":
    main()
