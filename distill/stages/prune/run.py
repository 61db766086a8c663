"""The prune stage at work: score, plan, cut, and write the smaller model with its scores and plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distill.core.artifact import write_bytes, write_text
from distill.core.errors import InputError
from distill.core.run_folder import CHECKPOINTS
from distill.core.stored import read_stored
from distill.data.cut_tokenizer import cut_tokenizer
from distill.models.layouts import layout_of
from distill.models.load import load_config
from distill.models.weight_files import prune_folder
from distill.pruning.base import Scores
from distill.pruning.keep import KeepSpec
from distill.pruning.layout import Config, Layout
from distill.pruning.origin import PLAN
from distill.pruning.plan import Plan, plan
from distill.pruning.select import target_sizes
from distill.reporting.plots import Plot
from distill.reporting.score_plots import score_plots
from distill.stages.models import check_vocabulary, save_plain, stored_dtype_of
from distill.stages.prune.kept_tokens import tokens_of
from distill.stages.prune.reconstruction import reconstructed
from distill.stages.prune.scoring import of_axes, scores_of, write
from distill.stages.prune.search.budget_search import Search
from distill.stages.prune.spec import Prune
from distill.stages.session import StageContext

SCORES = "scores.safetensors"


def run(stage: Prune, context: StageContext) -> dict[str, Any]:
    """Score, plan, cut, and write the smaller model with its scores and plan."""
    location = context.session.artifact(stage.model).location
    dtype = stored_dtype_of(location, stage.save_dtype)
    check_vocabulary(context, location)
    lineage = context.session.artifact(stage.model).lineage()
    if lineage is not None and lineage.mask is not None:
        raise InputError(
            f"{stage.model}: its weights are masked ({lineage.mask}), which a cut would break; cut first, mask then"
        )
    config = load_config(location).to_dict()
    layout = layout_of(config)
    # What cannot be is refused before anything is computed.
    stage.check_criteria(layout)
    rows = None
    if stage.keep is not None:
        target_sizes(stage.keep, config, layout)
        rows = tokens_of(context, location, stage.keep.vocabulary) if stage.keep.vocabulary else None
        keep, scores = stage.keep, _scores(stage, context, location, layout, config)
    else:
        keep, scores = _searched(stage, context, location, layout, config, dtype)
    the_plan = plan(scores, keep, layout, config, vocabulary=rows)
    for line in the_plan.summary():
        context.say(line)
    pruned = prune_folder(location, the_plan, layout, torch.float32 if stage.reconstruct else getattr(torch, dtype))
    write_text(context.folder / PLAN, json.dumps(the_plan.to_dict()))
    drawn = score_plots_of(context.folder / SCORES, context.folder / PLAN, context.name) if stage.choices() else []
    for plot in drawn:
        write_bytes(context.folder / f"{plot.name}.png", plot.png)
    figures: dict[str, Any] = {
        "parameters_before": the_plan.parameters_before,
        "parameters": the_plan.parameters,
        "plan": the_plan.summary(),
    }
    if stage.reconstruct is not None:
        figures["reconstruct"] = reconstructed(
            context, stage.reconstruct, pruned, location, the_plan, layout, stage.calibration_batch_size
        )
    tokenizer = None
    if rows is not None:
        tokenizer = cut_tokenizer(context.session.tokenizer(), rows, context.folder / CHECKPOINTS / "tokenizer")
    context.write_model(
        save_plain(pruned, dtype),
        parent=stage.model,
        teacher=None,
        figures=figures,
        tokenizer=tokenizer,
    )
    return figures


def _searched(
    stage: Prune, context: StageContext, location: str, layout: Layout, config: Config, dtype: str
) -> tuple[KeepSpec, Scores]:
    """The sizes that fit the budget best, and the scores by which they were tried."""
    assert stage.search is not None
    search = Search(context, stage.search, stage.model, layout, config, dtype, stage.calibration_batch_size)
    scores = _scores(stage, context, location, layout, config)
    return search.choose(scores), scores


def _scores(stage: Prune, context: StageContext, location: str, layout: Layout, config: Config) -> Scores:
    """Scores of the axes that are cut, into the stage's folder; forward passes only where none were made before."""
    choices = stage.choices()
    if not choices:
        return Scores()
    keys = list(dict.fromkeys(choices.values()))
    keep, num_layers = stage.keep or KeepSpec(), layout.sizes(config)["layers"]  # a search drops any number of them
    criteria = [getattr(stage, key).resolved_for(keep, num_layers) for key in keys]
    found, about = scores_of(context, location, criteria, layout, stage.calibration_batch_size)
    scores = of_axes(choices, dict(zip(keys, found, strict=True)))
    write(context.folder / SCORES, scores, about | {key: criteria[i].kind for i, key in enumerate(keys)})
    return scores


def score_plots_of(scores: Path, plan: Path, name: str) -> list[Plot]:
    """The pictures of the scores by which a stage has cut, with what its plan keeps.

    Args:
        scores: :data:`SCORES` of the stage.
        plan: its :data:`PLAN`.
        name: of the stage.

    Raises:
        InputError: a file is not what the stage writes.
    """
    return score_plots(name, Scores(**load_file(scores)), read_stored(plan, Plan, f"run stage {name} again"))
