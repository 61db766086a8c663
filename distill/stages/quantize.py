"""Low-bit weights: trained through fake-quant layers, or just rounded, then packed for real."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import model_validator

from distill.core.errors import InputError
from distill.models.lora import LoraSpec
from distill.quantization import QUANTIZERS, IntGroup
from distill.quantization.base import QuantizerSpec
from distill.stages.base import SELF, StageContext, StageSpec
from distill.stages.train import check_own_teacher
from distill.training.spec import DistillSpec


class Quantize(DistillSpec, StageSpec):
    """Train a student with fake-quant layers on the teacher's logits, then store real low-bit weights.

    ``num_tokens: 0`` is post-training rounding to nearest: the baseline of quantization-aware training.
    """

    makes_model: ClassVar[bool] = True

    kind: Literal["quantize"] = "quantize"
    student: str
    """What to quantize: an earlier stage, "teacher", a folder or a Hub id."""
    teacher: str = "teacher"
    """Whom to learn from: a model, a cache of one, or "self": the student before quantization, at no memory (needs
    lora). Without effect (and not read) when nothing is trained."""
    quantizer: Annotated[QuantizerSpec, QUANTIZERS] = IntGroup()
    """The grid of the weights."""
    lora: LoraSpec | None = None
    """Train adapters on the fake-quantized weights instead of the weights; folded in before rounding. Unset is off."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Quantize:
        if not self.trains():
            idle = [
                key
                for key in ("losses", "on_policy", "lora", "optimizer")
                if key in self.model_fields_set and getattr(self, key)
            ]
            idle = [key for key in idle if getattr(self, key) != type(self).model_fields[key].default]
            if idle:
                raise ValueError(f"nothing is trained (a budget of 0), so {', '.join(idle)} has no effect; remove it")
        return self

    @model_validator(mode="after")
    def _own_teacher(self) -> Quantize:
        if self.trains():
            check_own_teacher(self.teacher, self.lora, silent=False)
        return self

    def trains(self) -> bool:
        """Whether there is any training."""
        return bool(self.num_tokens or self.num_steps)

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The student, and the teacher when there is training."""
        taught = self.trains() and self.teacher != SELF
        return [(("student",), self.student), *([(("teacher",), self.teacher)] if taught else [])]

    def run(self, context: StageContext) -> dict[str, Any]:
        """Prepare, train, convert; then hold the packed model against the trained one."""
        import torch

        from distill.exporters.compressed_tensors import save
        from distill.exporters.huggingface import verify
        from distill.models.load import load_config, load_model, low_bit_scheme, move
        from distill.quantization.convert import round_unquantized
        from distill.stages.train import check_speaks, hold_mask, stored_dtype_of, train
        from distill.training.assemble import assemble, disassemble

        location = context.session.artifact(self.student).location
        if low_bit_scheme(load_config(location)):
            raise InputError(
                f"{self.student}: its weights are low-bit already; quantize the model that it was made from"
            )
        check_speaks(context, location)
        start = load_model(location, dtype="float32")
        mask = hold_mask(context, self.student, start, lora=self.lora is not None)
        student = assemble(
            start,
            quantizer=self.quantizer,
            lora=self.lora,
            gradient_checkpointing=context.session.compute.gradient_checkpointing and self.trains(),
        )
        teacher = self.teacher if self.trains() else None
        figures = train(context, student, self.losses, self, teacher=teacher, start=self.student)
        model = move(disassemble(student), "cpu")  # merged where it was trained: elsewhere the bits may differ
        # a loader casts scales to the type of the folder, which must keep them
        kept = stored_dtype_of(location, "auto") == "float32"
        dtype = torch.float32 if kept else getattr(torch, self.quantizer.scale_dtype)
        round_unquantized(model, dtype)
        measured: dict[str, Any] = {}

        def write(folder: Path) -> None:
            size = save(model, folder, dtype=dtype)
            batches = context.session.corpus().calibration_loader(num_sequences=4, batch_size=4)
            result = verify(model, folder, batches)
            measured.update(
                quantized_layers=size.layers, share_of_bfloat16=round(size.ratio, 4), verified_worst_kl=result.worst_kl
            )

        context.write_model(
            write,
            kind=self.kind,
            parent=self.student,
            teacher=context.session.teacher_behind(self.student if self.teacher == SELF else self.teacher)
            if self.trains()
            else None,
            figures=figures | {"scheme": self.quantizer.label(), "gguf_type": self.quantizer.gguf_type},
            mask=mask,
        )
        size, worst = measured["share_of_bfloat16"], measured["verified_worst_kl"]
        context.say(
            f"{measured['quantized_layers']} layers as {self.quantizer.label()}, {size:.3f} of their bf16 bytes"
        )
        context.say(f"reloaded by plain transformers: worst KL to the trained model {worst:.1e}")
        return figures | measured | {"scheme": self.quantizer.label()}
