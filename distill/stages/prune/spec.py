"""A smaller architecture cut out of a model, by the importance of its units on a calibration set."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from distill.core.errors import InputError
from distill.losses import ForwardKL
from distill.models.configs import count, is_counted, largest
from distill.models.layouts import layout_of
from distill.pruning import CRITERIA, Activation, BlockInfluence
from distill.pruning.base import CriterionSpec
from distill.pruning.keep import AXIS_OF_KEY, KeepSpec
from distill.pruning.layout import Config, Layout, shape
from distill.pruning.reconstruct import ReconstructSpec
from distill.pruning.search import Candidate
from distill.pruning.select import target_sizes
from distill.stages.base import View
from distill.stages.checks import check_task, refuse_task
from distill.stages.forecast import Forecast, Need, Training
from distill.stages.prune.search.spec import SearchSpec
from distill.stages.text import ReadsText

if TYPE_CHECKING:
    from distill.stages.session import StageContext

SCORES = "scores.safetensors"


class Prune(ReadsText):
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
    """Model to prune: "teacher", an earlier stage (a corrected teacher), a folder or a Hub id."""
    keep: KeepSpec | None = None
    """Sizes to keep; sizes that are not named are not pruned. Exclusive with search."""
    search: SearchSpec | None = None
    """Search the best sizes within a budget, such as {budget: {non_embedding_parameters: 50%}}. Exclusive with keep."""
    criterion: Annotated[CriterionSpec, CRITERIA] = Activation()
    """Criterion that scores neurons, heads, hidden channels and experts."""
    mlp_criterion: Annotated[CriterionSpec, CRITERIA] | None = None
    """Different criterion for MLP neurons; null uses criterion."""
    depth_criterion: Annotated[CriterionSpec, CRITERIA] = BlockInfluence()
    """Criterion that scores layers, if their number is reduced."""
    calibration_batch_size: int = Field(8, ge=1)
    """Number of sequences per forward pass; data.calibration_sequences is their total number."""
    reconstruct: ReconstructSpec | None = None
    """Recompute output projections after pruning, such as {num_sequences: 64}. It improves the pruned model, but has
    less effect after training. Both models must fit into memory. Null is off."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the stored weights; auto is that of the model before pruning."""

    @model_validator(mode="after")
    def _sizes_come_from_one_place(self) -> Prune:
        if (self.keep is None) == (self.search is None):
            fix = "" if self.keep is None else "; set the other to null, as by --set stages.prune.keep=null"
            raise ValueError(f"say what stays once: keep with its sizes, or search with a budget{fix}")
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
        choices = self.choices()
        for axis, key in choices.items():
            criterion: CriterionSpec = getattr(self, key)
            if axis not in criterion.axes:
                sized = next((name for name, of in AXIS_OF_KEY.items() if of == axis), "num_hidden_layers")
                own = "; for MLP neurons only, set mlp_criterion" * (
                    key == "criterion" and "mlp_neurons" in criterion.axes
                )
                raise ValueError(f"{key}: {criterion.kind} does not score {axis} ({sized}); choose another{own}")
        for key in ("criterion", "mlp_criterion", "depth_criterion"):
            given = key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default
            if given and key not in choices.values():
                raise ValueError(
                    f"{key} has no effect: {'keep' if self.keep else 'search'} cuts nothing that it scores"
                )
        return self

    def choices(self) -> dict[str, str]:
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
        key = self.choices().get("mlp_neurons")
        criterion: CriterionSpec | None = getattr(self, key) if key is not None else None
        if criterion is not None and layout.experts is not None and "experts" not in criterion.axes:
            knowing = [k for k, spec in CRITERIA.items() if issubclass(spec, CriterionSpec) and "experts" in spec.axes]
            raise InputError(
                f"{key}: {criterion.kind} does not score the neurons of experts; choose one of {', '.join(knowing)}"
            )

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The model that is cut."""
        return [(("model",), self.model)]

    def forecast(self, view: View) -> Forecast:
        """Every model that may come of the cut."""
        length, before = view.data.sequence_length, [c for c in view.configs(self.model) if "vocab_size" in c]
        made: Sequence[Config] = []
        if before and self.search is None:
            made = self._cuts(before)
        elif before:
            made = self._found(largest(before) or {}, length)
        check_task(self, view, starts=["model"])
        for key in ("search", "reconstruct"):
            if getattr(self, key) is not None:
                refuse_task(view, key)
        train = self.search.train if self.search is not None else None
        return Forecast(
            reads=self.reading(),
            does=[self._keeps(view)],
            makes=made,
            is_open=self.keep is None or self.keep.vocabulary == "used" or view.is_open(self.model),
            grids=(),
            training=None if train is None else Training(train, [ForwardKL()], self.model, is_trial=True),
            need=self._to_cut(view.config(self.model), largest(made)),
        )

    def rehearse(self, context: StageContext) -> None:
        """Compare the model's tokens with the run's; write a model folder without weights, draw a plot of scores."""
        from distill.stages.rehearsal import check_outside, rehearse_model, rehearse_plots

        check_outside(context, self.model)
        rehearse_model(context, self.model)
        if self.choices():
            rehearse_plots([context.name])

    def _keeps(self, view: View) -> str:
        if self.search is None:
            return f"keeps {self.keep.in_words()}" if self.keep is not None else ""
        config = view.config(self.model)
        if config is not None and not is_counted(config):
            return f"{self.search.in_words()} (the model's tokens are not counted yet)"
        if config is None:
            return f"{self.search.in_words()} (the model's config is not on this machine)"
        layout = layout_of(config)
        return self.search.told(layout, config, view.data, self._stored_dtype(config))

    def _cuts(self, configs: Sequence[Config]) -> list[Config]:
        """The model of each config as it will be.

        Raises:
            InputError: none of them can be cut so.
        """
        cut: list[Config] = []
        refused: list[InputError] = []
        for config in configs:
            try:
                cut.append(self._cut(config))
            except InputError as error:
                refused.append(error)
        if not cut:
            raise refused[0]
        return cut

    def _cut(self, config: Config) -> Config:
        assert self.keep is not None
        layout = layout_of(config)
        self.check_criteria(layout)
        sizes = target_sizes(self.keep, config, layout)
        if isinstance(self.keep.vocabulary, int):
            sizes["vocabulary"] = self.keep.vocabulary
        return {**config, **layout.resized(config, sizes)}

    def _found(self, config: Config, sequence_length: int) -> list[Config]:
        """Every model that the search may choose; of a budget of time, or a new model, that shows in the run."""
        assert self.search is not None
        layout = layout_of(config)
        self.check_criteria(layout)
        if self.search.budget.is_time or not is_counted(config):
            return [config]
        found = self.candidates(config, sequence_length)
        return [{**config, **layout.resized(config, one.sizes)} for one in found]

    def candidates(self, config: Config, sequence_length: int) -> list[Candidate]:
        """The architectures that the search has to choose from.

        Raises:
            InputError: none fits the budget.
        """
        assert self.search is not None
        layout = layout_of(config)
        return self.search.architectures(layout, config, sequence_length, self._stored_dtype(config))

    def _to_cut(self, before: Config | None, after: Config | None) -> Need | None:
        """While the weights are cut: the student, and the largest weight of the model as stored and as cut; or, where
        projections are solved anew, the student in float32 beside the whole model."""
        whole, student = count(before), count(after)
        if before is None or whole is None or student is None:
            return None
        if self.reconstruct is not None:
            return Need(4 * (student + whole), "to cut and reconstruct on a CPU, after scoring")
        layout = layout_of(before)
        sizes = layout.sizes(before)
        weights = (prod(shape(parameter, sizes)) for parameter in layout.parameters if parameter.exists(before))
        num_bytes = 2 if self._stored_dtype(before) in ("bfloat16", "float16") else 4
        return Need((student + 2 * max(weights)) * num_bytes, "to cut, after scoring")

    def _stored_dtype(self, config: Config) -> str:
        """Precision in which the cut model is stored."""
        return str(config.get("dtype") or config.get("torch_dtype")) if self.save_dtype == "auto" else self.save_dtype
