"""Single weights set to zero, and held there by whatever trains the model afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill.pruning.layout import Config
from distill.stages.base import View
from distill.stages.checks import check_task, refuse_task
from distill.stages.forecast import Forecast
from distill.stages.text import ReadsText

if TYPE_CHECKING:
    from distill.stages.session import StageContext


class Sparsify(ReadsText):
    """Mask weights of a model; its size and speed stay, as zeros are stored and run like other numbers."""

    makes_model: ClassVar[bool] = True

    kind: Literal["sparsify"] = "sparsify"
    model: str = "teacher"
    """Model to sparsify: "teacher", an earlier stage, a folder or a Hub id."""
    pattern: Literal["2:4", "unstructured"] = "2:4"
    """Positions of the zeros: two of every four neighbours in a row, or anywhere in a row."""
    share: float | None = Field(None, gt=0, lt=1)
    """Fraction of the weights of each row that become zero, for pattern: unstructured; null with 2:4."""
    criterion: Literal["wanda", "magnitude"] = "wanda"
    """Score by which weights are chosen. wanda: magnitude times the norm of the input on the calibration set."""
    calibration_batch_size: int = Field(8, ge=1)
    """Number of sequences per forward pass; data.calibration_sequences is their total number."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the stored weights; auto is that of the model before."""

    @model_validator(mode="after")
    def _share_belongs_to_unstructured(self) -> Sparsify:
        if (self.share is None) == (self.pattern == "unstructured"):
            wanted = "unstructured needs a share" if self.share is None else "2:4 has a share of its own, remove it"
            raise ValueError(f"share: {wanted} (got {self.share})")
        return self

    def label(self) -> str:
        """The mask in a few words."""
        return "2:4" if self.share is None else f"unstructured, {self.share:.0%} zeros"

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The model that is masked."""
        return [(("model",), self.model)]

    def forecast(self, view: View) -> Forecast:
        """A model of the same shape."""
        return replace(view.of_model(self.model, self._check), reads=self.reading())

    def _check(self, view: View, config: Config | None) -> None:
        refuse_task(view, "sparsify", "use prune")
        check_task(self, view)

    def rehearse(self, context: StageContext) -> None:
        """Compare the model's tokens with the run's; write a model folder without weights."""
        from distill.stages.rehearsal import check_outside, rehearse_model

        check_outside(context, self.model)
        rehearse_model(context, self.model)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Choose, set to zero, write."""
        from distill.models.layouts import layout_of
        from distill.models.load import load_config, move
        from distill.pruning.mask import apply_mask, masked_layers, nonzero_share, squares_of_inputs
        from distill.stages.models import check_vocabulary, load_on_device, save_plain, stored_dtype_of

        location = context.session.artifact(self.model).location
        dtype = stored_dtype_of(location, self.save_dtype)
        check_vocabulary(context, location)
        layout = layout_of(load_config(location).to_dict())
        model = load_on_device(context, location)
        layers = masked_layers(model, layout)
        squares = {}
        if self.criterion == "wanda":
            batches = context.session.corpus().calibration_loader(batch_size=self.calibration_batch_size)
            squares = squares_of_inputs(model, layout, batches)
        apply_mask(layers, self.pattern, self.share or 0.5, squares)
        share = nonzero_share(model)
        context.say(f"{len(layers)} layers masked, {self.label()}: {share:.1%} of all weights are not zero")
        figures = {"masked_layers": len(layers), "nonzero_share": share}
        context.write_model(
            save_plain(move(model, "cpu"), dtype),
            parent=self.model,
            teacher=None,
            figures=figures,
            mask=self.label(),
        )
        return figures
