"""A finished or running run, read from its folder: rows, curves, plans, scores, answers. No model is loaded."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from distill.api.measured_rows import Rows
from distill.core.errors import InputError
from distill.core.outside import is_file
from distill.core.run_folder import RECIPE, Done, Run
from distill.core.stored import read_stored
from distill.pruning.base import Scores
from distill.pruning.origin import PLAN
from distill.pruning.plan import Plan
from distill.recipe import Recipe
from distill.reporting.task_scores import TaskScores
from distill.reporting.verdict import verdict
from distill.stages.evaluate.stored_rows import rows_of, scores_of
from distill.stages.prune.spec import SCORES
from distill.stages.report.left import Left, loss_curves
from distill.stages.report.spec import ANSWERS

if TYPE_CHECKING:
    from torch import Tensor

Curve = list[tuple[float, float]]
"""(tokens trained on, value) of each point."""


def open_run(folder: str | Path) -> OpenRun:
    """Open the folder of a run to read its results; the run may still be going on.

    Args:
        folder: such as ``"runs/quickstart"``.

    Raises:
        InputError: it is not the folder of a run.

    Examples:
        >>> import distill
        >>> run = distill.open_run("runs/quickstart")                                    # doctest: +SKIP
        >>> run.rows.of("distill").perplexity, run.curves("distill")["val/kl"][-1]       # doctest: +SKIP
    """
    place = Path(folder)
    return OpenRun(place, load_run(place))


def load_run(folder: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        InputError: it is not a run folder.
    """
    if not is_file(folder / RECIPE):
        raise InputError(f"{folder}: not a run folder (no {RECIPE} in it)")
    return Recipe.load(folder / RECIPE)


class OpenRun:
    """The results of a run. Every file is checked against what its stage wrote.

    Args:
        folder: of the run.
        recipe: its recipe.

    Attributes:
        folder: of the run.
        recipe: with every value written out.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder, self.recipe = folder, recipe
        self._run = Run(folder)
        self._left = Left(self._run)

    def __repr__(self) -> str:
        return f"OpenRun({str(self.folder)!r}, stages: {', '.join(self.stages)})"

    @property
    def notes(self) -> list[str]:
        """A line for each file that has changed since it was written, and is left out of curves."""
        return self._left.notes

    @property
    def stages(self) -> dict[str, str]:
        """Name of each stage, in the order of the recipe -> its kind."""
        return {name: stage.kind for name, stage in self.recipe.stages.items()}

    def is_finished(self, stage: str) -> bool:
        """Whether a stage is finished.

        Raises:
            InputError: the run has no such stage.
        """
        self._check(stage)
        return self._run.done(stage) is not None

    def seconds(self, stage: str) -> float:
        """Seconds that a finished stage took.

        Raises:
            InputError: it is not finished.
        """
        return self._done(stage).seconds

    def figures(self, stage: str) -> dict[str, Any]:
        """What a finished stage has measured of its own work, such as ``training_tokens``.

        Raises:
            InputError: it is not finished.
        """
        return self._done(stage).figures

    @cached_property
    def rows(self) -> Rows:
        """The measured models, by all evaluate stages that measured on the text of the last one; empty: none is done.

        Raises:
            InputError: a file has changed since it was written.
        """
        return Rows(rows_of(self._run, self.recipe.stages))

    @cached_property
    def tasks(self) -> TaskScores:
        """The scores of the models on tasks, and their comparison in pairs; without tasks it holds none.

        Raises:
            InputError: a file has changed since it was written.
        """
        return scores_of(self._run, self.recipe.stages)

    @property
    def verdict(self) -> str:
        """What was gained and lost, in words."""
        return verdict(self.rows)

    def curves(self, stage: str) -> dict[str, Curve]:
        """The losses of a training stage, also of one that is not finished.

        Args:
            stage: its name.

        Returns:
            Name of the metric, such as ``train/forward_kl``, ``val/cross_entropy`` or ``val/kl`` -> points of (tokens
            trained on, nats per token). Empty for a stage that trains nothing.

        Raises:
            InputError: the run has no such stage.
        """
        self._check(stage)
        return loss_curves(self._left, [stage]).get(stage, {})

    def plan(self, stage: str = "prune") -> Plan:
        """What a prune stage kept; ``plan.summary()`` says it in words.

        Raises:
            InputError: it is not finished, has no plan, or its file has changed.
        """
        return read_stored(self._file(stage, PLAN), Plan, f"run stage {stage} again")

    def scores(self, stage: str = "prune") -> Scores:
        """The scores by which a prune stage chose, for the axes that it cut; see the fields for their shapes.

        Raises:
            InputError: it is not finished, has no scores, or its file has changed.
        """
        tensors: dict[str, Tensor] = {}
        with safe_open(self._file(stage, SCORES), "pt") as opened:
            for axis in opened.keys():  # noqa: SIM118
                tensors[axis] = opened.get_tensor(axis)
        return Scores(**tensors)

    def answers(self, stage: str = "report") -> list[tuple[str, dict[str, str]]]:
        """What the models answered to the prompts of a report stage, as (prompt, model -> answer).

        Raises:
            InputError: it is not finished, has no answers, or its file has changed.
        """
        found = read_stored(self._file(stage, ANSWERS), list[dict[str, Any]], f"run stage {stage} again")
        return [(item["prompt"], {name: one["text"] for name, one in item["answers"].items()}) for item in found]

    def model(self, stage: str) -> Path:
        """The folder of the model that a finished stage made, for ``distill.load`` or ``from_pretrained``.

        Raises:
            InputError: it is not finished, makes no model, or its model has changed.
        """
        self._done(stage)
        if not self.recipe.stages[stage].makes_model:
            raise InputError(f"{stage}: a stage of kind {self.stages[stage]} makes no model")
        model = Path(self._run.model(stage).location)
        self._run.check(stage, model.name)
        return model

    def page(self, stage: str = "report") -> Path:
        """The page of a report stage.

        Raises:
            InputError: it is not finished, or its file has changed.
        """
        return self._file(stage, "index.html")

    def _check(self, stage: str) -> None:
        if stage not in self.recipe.stages:
            raise InputError(f"{self.folder}: no stage {stage!r} (stages: {', '.join(self.stages)})")

    def _done(self, stage: str) -> Done:
        self._check(stage)
        if (done := self._run.done(stage)) is None:
            raise InputError(f"{self.folder}: stage {stage} is not finished; run it by distill resume {self.folder}")
        return done

    def _file(self, stage: str, name: str) -> Path:
        self._done(stage)
        if (file := self._run.result(stage, name)) is None:
            raise InputError(f"{self.folder}: stage {stage} of kind {self.stages[stage]} left no {name}")
        return file
