"""The rows of ``real_models``: figures over seeds, accuracies, and tests in pairs against the teacher and the default.

The answers of a contender are averaged over its seeds, question by question, and two models are compared on the
questions of all tasks together (:class:`distill.numerics.statistics.PairedMeans`). Holm's correction is over the
contenders of a cut.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import result
from benchmarks.real_model_cuts import WIDTH
from distill.numerics.statistics import PairedMeans, holm

FIGURES = ("perplexity", "kl_to_teacher", "top1_agreement")
Answers = Mapping[str, Sequence[bool]]
"""Task -> whether each of its questions is answered rightly."""


@dataclass(frozen=True)
class Measured:
    """A model that was measured.

    Attributes:
        name: of the contender, or "teacher".
        cut: share of the parameters outside the embeddings.
        seed: of its training; None before a training.
        figures: as in a row of a report; empty if there is no model.
        answers: see :data:`Answers`; empty if it was not asked.
        outcome: why there is no model.
    """

    name: str
    cut: float
    seed: int | None
    figures: Mapping[str, Any]
    answers: Answers = field(default_factory=dict)
    outcome: str = ""


def answers_of(stage: Path) -> dict[str, list[bool]]:
    """The answers of the only model that an evaluate stage has asked, by the measure of each task.

    Args:
        stage: folder of the stage.
    """
    found = {}
    for folder in sorted((stage / "tasks").iterdir()):
        (file,) = folder.glob("*.json")
        given = json.loads(file.read_text(encoding="utf-8"))
        key = "right" if given["measure"] == "accuracy" else "normalized_right"
        found[folder.name] = [bool(one[key]) for one in given["answers"]]
    return found


def rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """All rows of what was measured so far; of a model that was measured again, what was measured last."""
    measured = list({(one.name, one.cut, one.seed): one for one in measured}.values())
    return [*_starts(measured), *_trained(measured), *_tasks(measured), *_pairs(measured)]


def missing(made: Sequence[Mapping[str, Any]], cuts: Sequence[float], contenders: Sequence[str]) -> list[str]:
    """A note on the contenders that are not trained yet at a cut; none if all are.

    Args:
        made: rows of :func:`rows`.
        cuts: shares.
        contenders: names.
    """
    done = {(row["kept"], row["contender"]) for row in made if row["table"] in ("trained", "failed")}
    left = {cut: [name for name in contenders if (round(100 * cut), name) not in done] for cut in cuts}
    named = [f"{', '.join(names)} at {100 * cut:.0f} %" for cut, names in left.items() if names]
    return [f"Not trained yet: {'; '.join(named)}."] if named else []


def curve_row(name: str, cut: float, num_tokens: int, kind: str, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of the recovery against tokens."""
    figures = {key: result.spread([one[key] for one in seeds]) for key in FIGURES}
    taught = "the uncut model" if kind == "distill" else "the text alone"
    row = {"table": "curve", "contender": name, "kept": round(100 * cut), "tokens": num_tokens, "learns_from": taught}
    return row | {**figures, "seeds": len(seeds)}


def _starts(measured: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    """Before training, and the attempts without a model."""
    for one in measured:
        if one.seed is not None:
            continue
        row = {"table": "cut" if one.figures else "failed", "kept": round(100 * one.cut), "contender": one.name}
        if not one.figures:
            yield row | {"outcome": one.outcome}
            continue
        sizes = {key: one.figures[key] for key in ("parameters", "non_embedding_parameters")}
        yield row | sizes | {key: one.figures[key] for key in FIGURES}


def _contenders(measured: Sequence[Measured]) -> dict[tuple[float, str], dict[int, Measured]]:
    """(share, contender) -> its trained models by seed; one that was asked replaces the same one that was not."""
    found: dict[tuple[float, str], dict[int, Measured]] = {}
    for one in measured:
        if one.seed is not None:
            found.setdefault((one.cut, one.name), {})[one.seed] = one
    return found


def _trained(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Figures over the seeds, by share and then by perplexity."""
    made = []
    for (cut, name), seeds in _contenders(measured).items():
        all_seeds = list(seeds.values())
        figures = {key: result.spread([one.figures[key] for one in all_seeds]) for key in FIGURES}
        outside = all_seeds[0].figures["non_embedding_parameters"]
        row = {"table": "trained", "kept": round(100 * cut), "contender": name, "non_embedding_parameters": outside}
        made.append(row | {**figures, "seeds": len(seeds)})
    return sorted(made, key=lambda row: (-row["kept"], row["perplexity"]["mean"]))


def by_question(models: Sequence[Measured]) -> dict[str, list[float]]:
    """Task -> share of the models (of one contender, one per seed) that answer each question rightly."""
    asked = [one.answers for one in models if one.answers]
    if not asked:
        return {}
    return {task: [statistics.fmean(each) for each in zip(*(a[task] for a in asked), strict=True)] for task in asked[0]}


def _scored(measured: Sequence[Measured]) -> dict[tuple[float, str], tuple[dict[str, list[float]], int]]:
    """(share, contender) -> (right answers by question, seeds), of those that were asked; the teacher has share 1."""
    groups = {(1.0, one.name): [one] for one in measured if one.name == "teacher"}
    groups |= {key: [*seeds.values()] for key, seeds in _contenders(measured).items()}
    found = {key: (by_question(models), sum(bool(one.answers) for one in models)) for key, models in groups.items()}
    return {key: value for key, value in found.items() if value[0]}


def _tasks(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The accuracy on each task, and the mean over the tasks with its standard error over questions."""
    made = []
    for (cut, name), (scores, seeds) in _scored(measured).items():
        each = {task: statistics.fmean(right) for task, right in scores.items()}
        variances = [statistics.variance(right) / len(right) for right in scores.values()]
        mean = {"mean_accuracy": statistics.fmean(each.values()), "standard_error": sum(variances) ** 0.5 / len(each)}
        made.append({"table": "tasks", "kept": round(100 * cut), "contender": name, **mean, **each, "seeds": seeds})
    return sorted(made, key=lambda row: (-row["kept"], -row["mean_accuracy"]))


def _pairs(measured: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    """Each contender less the teacher, and each other contender less distill's default, on the same questions."""
    scored = {key: [r for right in scores.values() for r in right] for key, (scores, _) in _scored(measured).items()}
    for cut in dict.fromkeys(cut for cut, name in scored if name != "teacher"):
        others = [name for share, name in scored if share == cut and name not in ("teacher", WIDTH)]
        asked = [((1.0, "teacher"), name) for share, name in scored if share == cut and name != "teacher"]
        for pairs in (asked, [((cut, WIDTH), name) for name in others] if (cut, WIDTH) in scored else []):
            compared = [PairedMeans.of(scored[first], scored[cut, name]) for first, name in pairs]
            adjusted = holm([one.p() for one in compared])
            for (first, name), one, p_holm in zip(pairs, compared, adjusted, strict=True):
                low, high = one.interval()
                row = {"table": "pairs", "kept": round(100 * cut), "first": first[1], "second": name}
                row |= {"questions": len(one.differences), "difference": one.difference, "low": low, "high": high}
                yield row | {"p_holm": p_holm, "finding": _finding(one.difference, p_holm)}


def _finding(difference: float, p_holm: float) -> str:
    if p_holm > 0.05:
        return "no difference shown"
    return "better" if difference > 0 else "worse"
