"""Single weights set to zero, and held there by whatever trains the model afterwards."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill.stages.base import StageContext, StageSpec


class Sparsify(StageSpec):
    """Mask weights of a model; its size and speed stay, as zeros are stored and run like other numbers."""

    makes_model: ClassVar[bool] = True

    kind: Literal["sparsify"] = "sparsify"
    model: str = "teacher"
    """What to mask: "teacher", an earlier stage, a folder or a Hub id."""
    pattern: Literal["2:4", "unstructured"] = "2:4"
    """Where zeros may stand: two of every four neighbours in a row, or anywhere in a row."""
    share: float | None = Field(None, gt=0, lt=1)
    """Share of the weights of each row that become zero, where the pattern is unstructured; null with 2:4."""
    criterion: Literal["wanda", "magnitude"] = "wanda"
    """By what weights are chosen: size times the input's norm on the calibration set, or size alone."""
    calibration_batch_size: int = Field(8, ge=1)
    """Sequences a forward pass; how many there are in all is data.calibration_sequences."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the stored weights; auto is that of the model that is masked."""

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

    def run(self, context: StageContext) -> dict[str, Any]:
        """Choose, set to zero, write."""
        from distill.models.layouts import layout_for
        from distill.models.load import load_config, load_model, move
        from distill.pruning.mask import apply_mask, masked_layers, nonzero_share, squares_of_inputs
        from distill.stages.train import check_packing, check_speaks, save_plain, stored_dtype_of
        from distill.training.trainer import resolve_device

        location = context.session.artifact(self.model).location
        dtype = stored_dtype_of(location, self.save_dtype)
        check_speaks(context, location)
        layout = layout_for(load_config(location).model_type)
        device = resolve_device(context.session.compute)
        loaded = check_packing(context, load_model(location, dtype="float32" if device == "cpu" else "auto"))
        model = move(loaded, device)
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
            kind=self.kind,
            parent=self.model,
            teacher=None,
            figures=figures,
            mask=self.label(),
        )
        return figures
