"""A smaller architecture cut out of a model, by the importance of its units on a calibration set."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill.core.artifact import write_bytes, write_text
from distill.pruning import CRITERIA, Activation, BlockInfluence
from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.keep import AXIS_OF_KEY, KeepSpec
from distill.stages.base import StageContext, StageSpec

PLAN = "plan.json"
SCORES = "scores.safetensors"


class Prune(StageSpec):
    """Cut layers, MLP neurons, heads, KV groups, hidden channels and experts; the result is a smaller plain model."""

    makes_model: ClassVar[bool] = True

    kind: Literal["prune"] = "prune"
    model: str = "teacher"
    """What to cut: "teacher", an earlier stage (a corrected teacher), a folder or a Hub id."""
    keep: KeepSpec
    """Sizes that stay; what is not named stays whole."""
    criterion: Annotated[CriterionSpec, CRITERIA] = Activation()
    """How neurons, heads and hidden channels are scored."""
    depth_criterion: Annotated[CriterionSpec, CRITERIA] = BlockInfluence()
    """How layers are scored, where keep lowers their number."""
    calibration_batch_size: int = Field(8, ge=1)
    """Sequences a forward pass; how many there are in all is data.calibration_sequences."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the stored weights; auto is that of the model that is cut."""

    @model_validator(mode="after")
    def _criteria_score_what_is_cut(self) -> Prune:
        for key, axes in (("criterion", self._width_axes()), ("depth_criterion", self._depth_axes())):
            criterion: CriterionSpec = getattr(self, key)
            lacking = [axis for axis in axes if axis not in criterion.axes]
            if lacking:
                raise ValueError(f"{key}: {criterion.kind} does not score {', '.join(lacking)}; choose another")
            if key in self.model_fields_set and not axes and criterion != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect: keep cuts nothing that it scores")
        return self

    def _width_axes(self) -> list[str]:
        cut = [axis for key, axis in AXIS_OF_KEY.items() if getattr(self.keep, key) is not None and axis != "layers"]
        return [axis for axis in cut if axis != "kv_groups" or self.keep.group_choice != "pool"]

    def _depth_axes(self) -> list[str]:
        return ["layers"] if self.keep.num_hidden_layers is not None else []

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The model that is cut."""
        return [(("model",), self.model)]

    def run(self, context: StageContext) -> dict[str, Any]:
        """Score, plan, cut, and write the smaller model with its scores and plan."""
        import torch
        from safetensors.torch import save

        from distill.models.layouts import layout_for
        from distill.models.load import load_config
        from distill.models.shards import carve_folder
        from distill.pruning.plan import plan
        from distill.pruning.select import target_sizes
        from distill.stages.train import check_speaks, save_plain, stored_dtype_of

        location = context.session.artifact(self.model).location
        dtype = stored_dtype_of(location, self.save_dtype)
        check_speaks(context, location)
        config = load_config(location)
        layout = layout_for(config.model_type)
        target_sizes(self.keep, config.to_dict(), layout)  # what cannot be is refused before anything is computed
        scores = self._scores(context, location, layout)
        the_plan = plan(scores, self.keep, layout, config.to_dict())
        for line in the_plan.summary():
            context.say(line)
        pruned = carve_folder(location, the_plan, layout, getattr(torch, dtype))
        write_bytes(context.folder / SCORES, save({axis: t.contiguous() for axis, t in scores.tensors().items()}))
        write_text(context.folder / PLAN, json.dumps(the_plan.to_dict()))
        figures = {
            "parameters_before": the_plan.parameters_before,
            "parameters": the_plan.parameters,
            "plan": the_plan.summary(),
        }
        context.write_model(save_plain(pruned, dtype), kind=self.kind, parent=self.model, teacher=None, figures=figures)
        return figures

    def _device(self, context: StageContext) -> str:
        from distill.training.trainer import resolve_device

        return resolve_device(context.session.compute)

    def _scores(self, context: StageContext, location: str, layout: Any) -> Scores:
        """Forward passes over the calibration set, for the axes that are cut and no others."""
        from distill.models.load import load_model, move
        from distill.stages.train import check_packing

        wanted = [
            c for c, axes in ((self.criterion, self._width_axes()), (self.depth_criterion, self._depth_axes())) if axes
        ]
        scores = Scores()
        if not wanted:
            return scores
        device = self._device(context)
        loaded = check_packing(context, load_model(location, dtype="float32" if device == "cpu" else "auto"))
        model = move(loaded, device)
        batches = list(context.session.corpus().calibration_loader(batch_size=self.calibration_batch_size))
        for criterion in wanted:
            found = criterion.score(model, layout, batches).tensors()
            cut = {*self._width_axes()} if criterion is self.criterion else {*self._depth_axes()}
            scores = scores.merge(Scores(**{axis: tensor for axis, tensor in found.items() if axis in cut}))
        context.say(f"scored {', '.join(scores.tensors())} on {sum(len(b['mask']) for b in batches)} sequences")
        return scores
