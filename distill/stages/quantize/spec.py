"""Low-bit weights: trained through fake-quant layers, or only rounded, and then stored packed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distill.core.errors import InputError
from distill.core.spec import Spec
from distill.models.lora import LoraSpec
from distill.pruning.layout import Config
from distill.quantization import ACTIVATIONS, QUANTIZERS, ActivationSpec, IntGroup
from distill.quantization.base import QuantizerSpec
from distill.quantization.embeddings import EmbeddingsKind, embeddings_grid
from distill.quantization.kv_cache import CacheType
from distill.stages.base import SELF, View
from distill.stages.checks import (
    check_documents,
    check_ends,
    check_own_teacher,
    check_sizes,
    check_states,
    check_task,
    note_on_ends,
    refuse_task,
)
from distill.stages.forecast import FakeQuant, Forecast, Training
from distill.stages.passes import say_passes
from distill.stages.quantize.layer_checks import check_layers
from distill.stages.text import ReadsText
from distill.training.spec import DistillSpec

if TYPE_CHECKING:
    from distill.stages.session import StageContext


class LayerGrid(Spec):
    """A different grid for some layers."""

    match: str
    """Pattern for a layer's dotted name or its last part, such as "*.down_proj"; the first pattern that matches is
    used."""
    quantizer: Annotated[QuantizerSpec, QUANTIZERS]
    """The grid of these layers."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> LayerGrid:
        self.quantizer.without_layers()
        return self


class MixedSpec(Spec):
    """Grids in addition to the stage's quantizer; each layer gets one of them."""

    also: tuple[Annotated[QuantizerSpec, QUANTIZERS], ...] = Field(min_length=1)
    """Other grids that a layer may get, such as [{kind: int_group, bits: 2}, int8_channel]."""
    bits: float = Field(gt=1, le=16)
    """Largest mean number of stored bits per weight, including scales, over the quantized linear layers."""
    num_sequences: int = Field(8, ge=1)
    """Number of calibration sequences for the scan, in which one layer at a time is quantized, once per grid."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> MixedSpec:
        for grid in self.also:
            grid.without_layers()
        return self


class Quantize(DistillSpec, ReadsText):
    """Train a student with fake-quant layers on the teacher's logits, then store low-bit weights.

    ``num_tokens: 0`` is post-training rounding to nearest: the baseline of quantization-aware training.
    ``losses: [cross_entropy]`` trains on the text alone, without a teacher.
    """

    makes_model: ClassVar[bool] = True
    may_be_untaught: ClassVar[bool] = True

    kind: Literal["quantize"] = "quantize"
    student: str
    """Model to quantize: an earlier stage, "teacher", a folder or a Hub id."""
    teacher: str = "teacher"
    """Teacher: a model, a cache, or "self": the student before quantization, without additional memory (requires lora).
    Not read if nothing is trained, or if no loss needs a teacher."""
    quantizer: Annotated[QuantizerSpec, QUANTIZERS] = IntGroup()
    """Grid of the weights."""
    layers: tuple[LayerGrid, ...] = ()
    """Different grids for some layers, such as [{match: "*.down_proj", quantizer: int8_channel}]; [] is off."""
    embeddings: EmbeddingsKind | None = None
    """Grid of embeddings and output head, tied or not: blocks of 32, blocks of 256, one scale per row, or 16 bits;
    unset: int8 in blocks of 32 (q8_0 beside grids of GGUF) if the quantizer has at most 4 bits, else keep."""
    mixed: MixedSpec | None = None
    """Choose each linear layer's grid within a budget of bits, by a scan that measures the loss from quantizing each
    layer; unset is off."""
    activations: Annotated[ActivationSpec, ACTIVATIONS] | None = None
    """Grid of the quantized layers' inputs; unset is off. A static grid is calibrated before the training."""
    kv_cache: CacheType | None = None
    """Round keys and values like llama.cpp's cache of this type (8.5 or 4.5 bits per value instead of 16); unset is
    off."""
    from_step: int = Field(0, ge=0)
    """Optimizer step from which the weights are fake-quantized. Training before this step is in full precision; 0:
    fake-quantized from the start."""
    freeze_scales: float | None = Field(None, gt=0, lt=1)
    """Fraction of the steps after which the scales of the weights are frozen, such as 0.9, so that the codes settle;
    from then on, weights beyond their range are clipped. Unset: scales follow the weights until the end."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """How codes are chosen. nearest: each weight is rounded to the nearest code; gptq: later columns correct the errors
    of earlier ones (needs the calibration set). With gptq, training starts from the gptq result and then rounds to
    nearest (needs scale: learned)."""
    equalize: Literal["awq", "smooth_quant"] | None = None
    """Fold scales of the input channels into the norms before quantization, to reduce its error: awq for weights of 4
    bits or fewer, smooth_quant for int8 activations (needs the calibration set). Unset is off."""
    lora: LoraSpec | None = None
    """Train LoRA adapters on the fake-quantized weights instead of the weights. They are merged before rounding. Unset
    is off."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Quantize:
        if not self.trains():
            idle = [
                key
                for key in (*DistillSpec.model_fields, "lora", "from_step", "freeze_scales")
                if key not in ("num_tokens", "num_steps", "num_epochs")
                and getattr(self, key) != type(self).model_fields[key].default
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
            raise ValueError(
                f"rounding: gptq supports symmetric integer quantizers (got {refused[0]}); use rounding: nearest"
            )
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
    def _one_grid_of_embeddings(self) -> Quantize:
        if self.quantizer.include and self.embeddings not in (None, "keep"):
            raise ValueError(
                f"quantizer.include puts embeddings on the grid of the layers, and embeddings on {self.embeddings}; "
                "remove one of them"
            )
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

    def embeddings_grid(self, width: int | None = None) -> QuantizerSpec | None:
        """The grid of embeddings and head whose rows are so long (None: a multiple of 32), or None if they are kept."""
        return embeddings_grid(self.embeddings, self.quantizer, width)

    def label(self, width: int | None = None) -> str:
        """The grids in a few words, for tables; ``width`` is the length of a row of the embeddings."""
        embeddings = self.embeddings_grid(width)
        others = [f"{one.match}: {one.quantizer.label()}" for one in self.layers]
        others += [f"embeddings {embeddings.label()}"] if embeddings and not self.quantizer.include else []
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

    def trains(self) -> bool:
        """Whether there is any training."""
        return self.is_trained()

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
        reads_teacher = self.taught_by() not in (None, SELF)
        return [(("student",), self.student), *([(("teacher",), self.teacher)] if reads_teacher else [])]

    def forecast(self, view: View) -> Forecast:
        """A model of the same shape, its weights on the grids."""
        teacher = self.taught_by()
        return replace(
            view.of_model(self.student, self._check),
            reads=self.reading(),
            does=self.in_words(view.data.sequence_length, view.data.packing),
            grids=self.every_grid(),
            activations=self.activations,
            embeddings=self.quantizer if self.quantizer.include else self.embeddings_grid(),
            training=Training(
                self,
                self.losses,
                None if teacher == SELF else teacher,
                self.lora,
                FakeQuant(self.quantizer, self.grids(), self.activations, self.kv_cache, self.embeddings),
            ),
            notes=[] if teacher in (None, SELF) or self.on_policy else note_on_ends(self.student, self.teacher, view),
        )

    def rehearse(self, context: StageContext) -> None:
        """Compare the models' tokens with the run's; write a model folder without weights, draw a plot of a scan."""
        from distill.stages.rehearsal import check_outside, rehearse_model, rehearse_plots

        check_outside(context, *(reference for _, reference in self.references()))
        rehearse_model(context, self.student)
        say_passes(context, self)
        if self.mixed is not None:
            rehearse_plots(grid.label() for grid in self.every_grid())

    def _check(self, view: View, config: Config | None) -> None:
        refuse_task(view, "quantize", "export to onnx with weights: int8, which rounds encoders")
        check_sizes(self, view, config)
        if self.num_steps:  # of a budget in tokens, packing may make more or fewer
            self.check_steps(self.num_steps)
        if config is not None:
            check_layers(
                config,
                self.quantizer,
                self.grids(),
                kv_cache=self.kv_cache,
                rounding=self.rounding,
                embeddings=self.embeddings_grid,
            )
        check_task(self, view)
        check_states(self.losses, view, self.student, self.teacher)
        check_ends(self, self, view)
        check_documents(self, view)

    def taught_by(self) -> str | None:
        """The reference of the teacher that it learns from, or "self"; None when it learns from none."""
        return self.teacher if self.trains() and self.is_taught() else None
