"""A smaller architecture cut out of a model, by the importance of its units on a calibration set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from distill.core.artifact import read_json, write_bytes, write_text
from distill.core.errors import InputError
from distill.core.run import CHECKPOINTS
from distill.pruning import CRITERIA, Activation, BlockInfluence
from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.keep import AXIS_OF_KEY, KeepSpec
from distill.pruning.reconstruct import ReconstructSpec
from distill.stages.base import StageContext, StageSpec
from distill.stages.reconstruction import reconstructed
from distill.stages.scoring import scores_of, write
from distill.stages.search.spec import SearchSpec

if TYPE_CHECKING:
    from distill.pruning.layout import Config, Layout
    from distill.stages.report_page.plots import Plot

PLAN = "plan.json"
SCORES = "scores.safetensors"


class Prune(StageSpec):
    """Cut layers, MLP neurons, heads, KV groups, hidden channels and experts; the result is a smaller plain model."""

    # One of the two, for editors; a resolved recipe writes the other out as null.
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [key], "properties": {key: {"type": "object", "minProperties": 1}}}
                for key in ("keep", "search")
            ]
        }
    )
    makes_model: ClassVar[bool] = True

    kind: Literal["prune"] = "prune"
    model: str = "teacher"
    """What to cut: "teacher", an earlier stage (a corrected teacher), a folder or a Hub id."""
    keep: KeepSpec | None = None
    """Sizes that stay; what is not named stays whole. Exclusive with search."""
    search: SearchSpec | None = None
    """Find the sizes that fit a budget best, such as {budget: {non_embedding_parameters: 50%}}. Exclusive with keep."""
    criterion: Annotated[CriterionSpec, CRITERIA] = Activation()
    """How neurons, heads, hidden channels and experts are scored."""
    mlp_criterion: Annotated[CriterionSpec, CRITERIA] | None = None
    """How MLP neurons are scored, where otherwise than by criterion; null is by criterion."""
    depth_criterion: Annotated[CriterionSpec, CRITERIA] = BlockInfluence()
    """How layers are scored, where keep lowers their number."""
    calibration_batch_size: int = Field(8, ge=1)
    """Sequences a forward pass; how many there are in all is data.calibration_sequences."""
    reconstruct: ReconstructSpec | None = None
    """Solve output projections anew after the cut, such as {num_sequences: 64}: better right after it, less so after
    training. Needs both models in memory. Null leaves the weights as cut."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the stored weights; auto is that of the model that is cut."""

    @model_validator(mode="after")
    def _sizes_come_from_one_place(self) -> Prune:
        if (self.keep is None) == (self.search is None):
            mend = "" if self.keep is None else "; set the other to null, as by --set stages.prune.keep=null"
            raise ValueError(f"say what stays once: keep with its sizes, or search with a budget{mend}")
        if self.keep is not None and not self.keep.cuts():
            raise ValueError("keep names no size, so nothing would be cut; name one, such as {intermediate_size: 1024}")
        return self

    @model_validator(mode="after")
    def _reconstruct_has_something_to_solve(self) -> Prune:
        if self.reconstruct is None:
            return self
        cut = self.keep.cuts() if self.keep is not None else self.search.axes if self.search is not None else ()
        if "vocabulary" in cut:
            raise ValueError(
                "reconstruct compares with a model that reads the same tokens; cut the vocabulary in a stage of its own"
            )
        if {*cut} <= {"layers", "num_hidden_layers"}:
            raise ValueError("reconstruct has no effect on layers that go; it needs a size of theirs to be cut")
        return self

    @model_validator(mode="after")
    def _criteria_score_what_is_cut(self) -> Prune:
        choices = self._choices()
        for axis, key in choices.items():
            criterion: CriterionSpec = getattr(self, key)
            if axis not in criterion.axes:
                raise ValueError(f"{key}: {criterion.kind} does not score {axis}; choose another")
        for key in ("criterion", "mlp_criterion", "depth_criterion"):
            given = key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default
            if given and key not in choices.values():
                raise ValueError(
                    f"{key} has no effect: {'keep' if self.keep else 'search'} cuts nothing that it scores"
                )
        return self

    def _choices(self) -> dict[str, str]:
        """Axis that is cut by score -> key of the criterion that scores it."""
        if self.search is not None:
            cut = {AXIS_OF_KEY[key] for key in self.search.axes}
        else:
            cut = {axis for key, axis in AXIS_OF_KEY.items() if getattr(self.keep, key) is not None}
        if self.keep is not None and self.keep.group_choice == "pool":
            cut.discard("kv_groups")
        special = {"layers": "depth_criterion"}
        if self.mlp_criterion is not None:
            special["mlp_neurons"] = "mlp_criterion"
        return {axis: special.get(axis, "criterion") for axis in AXIS_OF_KEY.values() if axis in cut}

    def check_criteria(self, layout: Layout) -> None:
        """Refuse a criterion that cannot score this architecture, before anything is computed.

        Raises:
            InputError: it knows no experts, and their neurons are cut.
        """
        key = self._choices().get("mlp_neurons")
        criterion: CriterionSpec | None = getattr(self, key) if key is not None else None
        if criterion is not None and layout.experts is not None and "experts" not in criterion.axes:
            knowing = [k for k, spec in CRITERIA.items() if issubclass(spec, CriterionSpec) and "experts" in spec.axes]
            raise InputError(
                f"{key}: {criterion.kind} does not score the neurons of experts; choose one of {', '.join(knowing)}"
            )

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The model that is cut."""
        return [(("model",), self.model)]

    def run(self, context: StageContext) -> dict[str, Any]:
        """Score, plan, cut, and write the smaller model with its scores and plan."""
        import torch

        from distill.data.cut_tokenizer import cut_tokenizer
        from distill.models.layouts import layout_for
        from distill.models.load import load_config
        from distill.models.shards import carve_folder
        from distill.pruning.plan import plan
        from distill.pruning.select import target_sizes
        from distill.stages.tokens import tokens_of
        from distill.stages.train import check_speaks, save_plain, stored_dtype_of

        location = context.session.artifact(self.model).location
        dtype = stored_dtype_of(location, self.save_dtype)
        check_speaks(context, location)
        lineage = context.session.artifact(self.model).lineage()
        if lineage is not None and lineage.mask is not None:
            raise InputError(
                f"{self.model}: its weights are masked ({lineage.mask}), which a cut would break; cut first, mask then"
            )
        config = load_config(location).to_dict()
        layout = layout_for(config["model_type"])
        # What cannot be is refused before anything is computed.
        self.check_criteria(layout)
        rows = None
        if self.keep is not None:
            target_sizes(self.keep, config, layout)
            rows = tokens_of(context, location, self.keep.vocabulary) if self.keep.vocabulary else None
            keep, scores = self.keep, self._scores(context, location, layout, config)
        else:
            keep, scores = self._searched(context, location, layout, config, dtype)
        the_plan = plan(scores, keep, layout, config, vocabulary=rows)
        for line in the_plan.summary():
            context.say(line)
        pruned = carve_folder(location, the_plan, layout, torch.float32 if self.reconstruct else getattr(torch, dtype))
        write_text(context.folder / PLAN, json.dumps(the_plan.to_dict()))
        for plot in score_plots_of(context.folder, context.name):
            write_bytes(context.folder / f"{plot.name}.png", plot.png)
        figures: dict[str, Any] = {
            "parameters_before": the_plan.parameters_before,
            "parameters": the_plan.parameters,
            "plan": the_plan.summary(),
        }
        if self.reconstruct is not None:
            figures["reconstruct"] = reconstructed(
                context, self.reconstruct, pruned, location, the_plan, layout, self.calibration_batch_size
            )
        speaks = None
        if rows is not None:
            speaks = cut_tokenizer(context.session.tokenizer(), rows, context.folder / CHECKPOINTS / "tokenizer")
        context.write_model(
            save_plain(pruned, dtype),
            kind=self.kind,
            parent=self.model,
            teacher=None,
            figures=figures,
            tokenizer=speaks,
        )
        return figures

    def _searched(
        self, context: StageContext, location: str, layout: Layout, config: Config, dtype: str
    ) -> tuple[KeepSpec, Scores]:
        """The sizes that fit the budget best, and the scores by which they were tried."""
        from distill.stages.search.search import Search

        assert self.search is not None
        search = Search(context, self.search, self.model, layout, config, dtype, self.calibration_batch_size)
        scores = self._scores(context, location, layout, config)
        return search.choose(scores), scores

    def _scores(self, context: StageContext, location: str, layout: Layout, config: Config) -> Scores:
        """Scores of the axes that are cut, into the stage's folder; forward passes only where none were made before."""
        choices = self._choices()
        if not choices:
            return Scores()
        keys = list(dict.fromkeys(choices.values()))
        keep, num_layers = self.keep or KeepSpec(), layout.sizes(config)["layers"]  # a search drops any number of them
        criteria = [getattr(self, key).fitted_to(keep, num_layers) for key in keys]
        found, about = scores_of(context, location, criteria, layout, self.calibration_batch_size)
        tensors: dict[str, Any] = {}
        for axis, key in choices.items():
            scored = found[keys.index(key)].tensors()
            tensors |= {name: scored[name] for name in (axis, "layer_blocks") if name in scored}
        scores = Scores(**tensors)
        write(context.folder / SCORES, scores, about | {key: criteria[i].kind for i, key in enumerate(keys)})
        return scores


def score_plots_of(folder: Path, name: str) -> list[Plot]:
    """The pictures of a finished stage's scores, with what its plan keeps; none where nothing was scored."""
    from safetensors.torch import load_file

    from distill.pruning.plan import Plan
    from distill.stages.report_page.score_plots import score_plots

    if not (folder / SCORES).is_file():
        return []
    the_plan = Plan.from_dict(read_json(folder / PLAN))
    return score_plots(name, Scores(**load_file(folder / SCORES)), the_plan)
