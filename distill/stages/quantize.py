"""Low-bit weights: trained through fake-quant layers, or just rounded, then packed for real."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill.core.errors import InputError
from distill.core.spec import Spec
from distill.models.lora import LoraSpec
from distill.quantization import ACTIVATIONS, QUANTIZERS, ActivationSpec, IntGroup
from distill.quantization.base import QuantizerSpec, matches
from distill.quantization.kv_cache import CacheType
from distill.stages.base import SELF, StageContext, StageSpec
from distill.stages.mixed import MixedSpec, choose_grids, logits_of
from distill.stages.train import check_own_teacher
from distill.training.spec import DistillSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from distill.quantization.prepare import Layers


class LayerGrid(Spec):
    """Another grid for some layers."""

    match: str
    """Pattern for a layer's dotted name or its last part, such as "*.down_proj"; the first that fits decides."""
    quantizer: Annotated[QuantizerSpec, QUANTIZERS]
    """The grid of these layers."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> LayerGrid:
        self.quantizer.without_layers()
        return self


class Quantize(DistillSpec, StageSpec):
    """Train a student with fake-quant layers on the teacher's logits, then store real low-bit weights.

    ``num_tokens: 0`` is post-training rounding to nearest: the baseline of quantization-aware training.
    ``losses: [cross_entropy]`` trains on the text alone, without a teacher.
    """

    makes_model: ClassVar[bool] = True
    may_be_untaught: ClassVar[bool] = True

    kind: Literal["quantize"] = "quantize"
    student: str
    """What to quantize: an earlier stage, "teacher", a folder or a Hub id."""
    teacher: str = "teacher"
    """Whom to learn from: a model, a cache of one, or "self": the student before quantization, at no memory (needs
    lora). Without effect (and not read) when nothing is trained, or on the text alone."""
    quantizer: Annotated[QuantizerSpec, QUANTIZERS] = IntGroup()
    """The grid of the weights."""
    layers: tuple[LayerGrid, ...] = ()
    """Other grids for some layers, as [{match: "*.down_proj", quantizer: int8_channel}]; [] is off."""
    mixed: MixedSpec | None = None
    """Choose each linear layer's grid within a budget of bits, by a scan of what each layer costs; unset is off."""
    activations: Annotated[ActivationSpec, ACTIVATIONS] | None = None
    """The grid of the quantized layers' inputs; unset is off. A static one is calibrated before anything is trained."""
    kv_cache: CacheType | None = None
    """Round keys and values as llama.cpp's cache of this type does (8.5 or 4.5 bits each, not 16); unset is off."""
    from_step: int = Field(0, ge=0)
    """Optimizer step from which the weights are fake-quantized; before it training is in full precision; 0: all."""
    freeze_scales: float | None = Field(None, gt=0, lt=1)
    """Share of the steps after which the scales of the weights stand still, such as 0.9, so that the codes settle;
    weights that grow beyond their range clip from then on. Unset: scales follow the weights to the end."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """How codes are chosen: the nearest, or so that a column's error is made up for by the next ones (needs the
    calibration set). A training begins at what gptq has found, and then chooses the nearest (needs scale: learned)."""
    equalize: Literal["awq", "smooth_quant"] | None = None
    """Fold scales of the input channels into the norms first, so that less is lost: awq for weights of 4 bits and
    fewer, smooth_quant for int8 activations (needs the calibration set). Unset is off."""
    lora: LoraSpec | None = None
    """Train adapters on the fake-quantized weights instead of the weights; folded in before rounding. Unset is off."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Quantize:
        if not self.trains():
            idle = [
                key
                for key in (*DistillSpec.model_fields, "lora", "from_step", "freeze_scales")
                if key not in ("num_tokens", "num_steps") and getattr(self, key) != type(self).model_fields[key].default
            ]
            if idle:
                raise ValueError(
                    f"nothing is trained (a budget of 0), so without effect: {', '.join(idle)}; remove that"
                )
        return self

    @model_validator(mode="after")
    def _rounding(self) -> Quantize:
        grids = self.every_grid()
        if any(getattr(grid, "scale", None) == "learned" for grid in grids) and self.mixed is not None:
            raise ValueError("scale: learned cannot be scanned before it is trained; set scale: mse, or remove mixed")
        if self.trains() and self.rounding == "gptq":
            self._gptq_before_training(grids)
        if not self.trains() and any(getattr(grid, "scale", None) == "learned" for grid in grids):
            raise ValueError("scale: learned needs training; set num_tokens, or scale: mse")
        refused = [g.label() for g in (self.quantizer, *(self.mixed.also if self.mixed else ())) if not g.keeps_scale]
        if self.rounding == "gptq" and refused:
            raise ValueError(f"rounding: gptq rounds to symmetric integer grids, not {refused[0]}; set nearest")
        return self

    def _gptq_before_training(self, grids: list[QuantizerSpec]) -> None:
        if any(getattr(grid, "scale", None) != "learned" for grid in grids):
            raise ValueError("rounding: gptq before a training needs scale: learned, which goes on from its scales")
        if self.from_step:
            raise ValueError(
                "from_step trains in full precision first, which undoes rounding: gptq; remove one of them"
            )
        if self.lora is not None:
            raise ValueError("rounding: gptq changes the weights that lora would leave as they are; remove one of them")

    @model_validator(mode="after")
    def _one_choice(self) -> Quantize:
        if self.mixed is not None and self.layers:
            raise ValueError("mixed chooses the grid of every layer, so layers has no effect; remove one of them")
        return self

    @model_validator(mode="after")
    def _one_type(self) -> Quantize:
        floats = [g.kind for g in self.every_grid() if g.compressed_tensors_arguments()["type"] == "float"]
        if self.activations is not None and floats:
            raise ValueError(
                f"quantizer {floats[0]} has float codes and activations {self.activations.kind} integers, which no "
                "engine multiplies; choose int8_channel, or remove activations"
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_read(self) -> Quantize:
        named = self.teacher != type(self).model_fields["teacher"].default
        if self.trains() and not self.is_taught() and named:
            raise ValueError("no loss looks at the teacher, so teacher has no effect; remove it or add a loss")
        return self

    @model_validator(mode="after")
    def _no_dropout(self) -> Quantize:
        if self.lora is not None and self.lora.dropout:
            raise ValueError(f"lora.dropout ({self.lora.dropout:g}) has no effect on fake-quantized layers; remove it")
        return self

    @model_validator(mode="after")
    def _own_teacher(self) -> Quantize:
        if self.trains() and self.is_taught():
            check_own_teacher(self.teacher, self.lora, silent=False)
        return self

    def label(self) -> str:
        """The grids in a few words, for tables."""
        others = [f"{one.match}: {one.quantizer.label()}" for one in self.layers]
        others += [self.equalize] if self.equalize else []
        others += [self.rounding] if self.rounding != "nearest" else []
        others += [f"mixed, {self.mixed.bits:g} bits"] if self.mixed else []
        others += [self.activations.label()] if self.activations else []
        return "; ".join([self.quantizer.label(), *others, *([f"cache {self.kv_cache}"] if self.kv_cache else [])])

    def grids(self) -> list[tuple[str, QuantizerSpec]]:
        """(pattern, grid) of the layers that have their own."""
        return [(layer.match, layer.quantizer) for layer in self.layers]

    def every_grid(self) -> list[QuantizerSpec]:
        """The grids that a layer may get."""
        return [self.quantizer, *(grid for _, grid in self.grids()), *(self.mixed.also if self.mixed else ())]

    def grid_of(self, name: str) -> QuantizerSpec:
        """The grid of a layer that is not skipped."""
        return next((grid for pattern, grid in self.grids() if matches(pattern, name)), self.quantizer)

    def trains(self) -> bool:
        """Whether there is any training."""
        return bool(self.num_tokens or self.num_steps)

    def check_steps(self, num_steps: int) -> None:
        """Refuse what begins at a step that the training has not.

        Raises:
            InputError: ``from_step`` or ``freeze_scales`` does not fit into so many steps.
        """
        if self.from_step >= num_steps:
            raise InputError(f"from_step ({self.from_step}) must be less than the stage's {num_steps} steps; lower it")
        held = None if self.freeze_scales is None else int(self.freeze_scales * num_steps)
        if held is not None and held < self.from_step:
            raise InputError(
                f"freeze_scales ({self.freeze_scales:g}) holds scales from step {held} on, before the weights are "
                f"quantized at all (from_step: {self.from_step}); raise it or lower from_step"
            )

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The student, and the teacher when there is training."""
        reads_teacher = self._taught_by() not in (None, SELF)
        return [(("student",), self.student), *([(("teacher",), self.teacher)] if reads_teacher else [])]

    def _taught_by(self) -> str | None:
        return self.teacher if self.trains() and self.is_taught() else None

    def run(self, context: StageContext) -> dict[str, Any]:
        """Prepare, train, convert; then hold the packed model against the trained one."""
        import torch

        from distill.exporters.compressed_tensors import save
        from distill.exporters.huggingface import verify
        from distill.models.load import load_config, load_model, low_bit_scheme, move
        from distill.quantization.convert import round_unquantized
        from distill.quantization.fake_quant import fake_quant_layers, switch
        from distill.stages.train import check_speaks, hold_mask, load_trainable, stored_dtype_of, train
        from distill.training.assemble import assemble, disassemble

        location = context.session.artifact(self.student).location
        if low_bit_scheme(load_config(location)):
            raise InputError(
                f"{self.student}: its weights are low-bit already; quantize the model that it was made from"
            )
        check_speaks(context, location)
        if self.trains():
            self.check_steps(self.steps(context.session.corpus().tokens_per_sequence))
        # a scan needs the weights in each process, to find the same grids
        start = load_model(location, dtype="float32") if self.mixed else load_trainable(context, location)
        is_read = start.device.type != "meta"  # else what the first process makes of it is sent
        mask = hold_mask(context, self.student, start, lora=self.lora is not None)
        filled = [grid.kind for grid in self.every_grid() if not grid.keeps_zero]
        filled += [self.rounding] if self.rounding == "gptq" else []
        if mask is not None and filled:
            raise InputError(f"{self.student}: its weights are masked ({mask}), and {filled[0]} would fill the zeros")
        layers = choose_grids(context, start, self.quantizer, self.mixed) if self.mixed else self.grids()
        if self.equalize is not None and is_read:
            self._equalize(context, start, layers)
        student = assemble(
            start,
            quantizer=self.quantizer,
            layers=layers,
            activations=self.activations,
            kv_cache=self.kv_cache,
            lora=self.lora,
            gradient_checkpointing=context.session.compute.gradient_checkpointing and self.trains(),
        )
        if self.activations is not None and self.activations.calibrated and is_read:
            self._calibrate(context, student.model)
        if self.rounding == "gptq" and is_read:
            self._gptq(context, student.model)
        teacher = self._taught_by()
        figures = train(
            context,
            student,
            self.losses,
            self,
            teacher=teacher,
            start=self.student,
            quantized_from_step=self.from_step,
            freeze_scales=self.freeze_scales,
        )
        switch(student.model, enabled=True)
        model = move(disassemble(student), "cpu")  # merged where it was trained: elsewhere the bits may differ
        # a loader casts scales to the type of the folder, which must keep them
        kept = stored_dtype_of(location, "auto") == "float32"
        grids = [layer.spec for layer in fake_quant_layers(model).values()]
        scales = {grid.scale_dtype for grid in grids}
        dtype = torch.float32 if kept or len(scales) > 1 else getattr(torch, scales.pop())
        round_unquantized(model, dtype)
        measured: dict[str, Any] = {}

        def write(folder: Path) -> None:
            size = save(model, folder, dtype=dtype)
            batches = context.session.corpus().validation_loader(batch_size=4, num_sequences=4)
            result = verify(model, folder, batches)
            measured.update(
                quantized_layers=size.layers, share_of_bfloat16=round(size.ratio, 4), verified_worst_kl=result.worst_kl
            )

        context.write_model(
            write,
            kind=self.kind,
            parent=self.student,
            teacher=context.session.teacher_behind(self.student if teacher == SELF else teacher) if teacher else None,
            figures=figures | {"scheme": self.label(), "gguf_type": self.quantizer.gguf_type if not layers else None},
            mask=mask,
        )
        size, worst = measured["share_of_bfloat16"], measured["verified_worst_kl"]
        counts = Counter(grid.label() for grid in grids).most_common()
        each = "(" + "; ".join(f"{count} as {grid}" for grid, count in counts) + ")"
        scheme = each if self.mixed else f"as {self.label()}"
        context.say(f"{measured['quantized_layers']} layers {scheme}, {size:.3f} of their bf16 bytes")
        context.say(f"reloaded by plain transformers: worst KL to the trained model {worst:.1e}")
        return figures | measured | {"scheme": self.label()}

    def _equalize(self, context: StageContext, model: PreTrainedModel, layers: Layers) -> None:
        """Fold scales into a plain model, which computes what it did before."""
        from distill.quantization.equalize import equalize
        from distill.quantization.prepare import prepare, unprepare

        assert self.equalize is not None
        batches = _calibration(context, model)
        prepare(model, self.quantizer, layers)
        norms = equalize(model, batches, partial(logits_of, model), self.equalize)
        unprepare(model)
        num_sequences = sum(len(batch["mask"]) for batch in batches)
        context.say(f"scales folded into {len(norms)} norms by {self.equalize} on {num_sequences} sequences")

    def _calibrate(self, context: StageContext, model: PreTrainedModel) -> None:
        """Find the ranges of the activations on the run's calibration set."""
        from distill.quantization.calibrate import calibrate

        batches = _calibration(context, model)
        found = calibrate(model, batches, partial(logits_of, model))
        num_sequences = sum(len(batch["mask"]) for batch in batches)
        context.say(f"ranges of the inputs of {len(found)} layers from {num_sequences} sequences")

    def _gptq(self, context: StageContext, model: PreTrainedModel) -> None:
        """Round the weights on the run's calibration set."""
        from distill.quantization.gptq import gptq

        batches = _calibration(context, model)
        rounded = gptq(model, batches, partial(logits_of, model))
        num_sequences = sum(len(batch["mask"]) for batch in batches)
        context.say(f"{len(rounded)} layers rounded by gptq on {num_sequences} sequences")


def _calibration(context: StageContext, model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """The run's calibration set, and the model moved to where it is to be read."""
    from distill.models.load import move
    from distill.training.trainer import resolve_device

    move(model, resolve_device(context.session.compute))
    return list(context.session.corpus().calibration_loader(batch_size=4))
