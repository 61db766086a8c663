"""The quantize stage at work: prepare, train, convert; then compare the packed model with the trained one."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.core.errors import InputError
from distill.exporters.compressed_tensors import save
from distill.exporters.plain_transformers import verify
from distill.models.load import load_config, load_model, low_bit_scheme, move
from distill.quantization.base import Layers, QuantizerSpec
from distill.quantization.calibrate import calibrate
from distill.quantization.convert import round_unquantized
from distill.quantization.equalize import equalize
from distill.quantization.fake_quant import fake_quant_layers, switch
from distill.quantization.gptq import gptq
from distill.quantization.prepare import prepare, unprepare
from distill.stages.base import SELF
from distill.stages.models import check_vocabulary, hold_mask, load_trainable, stored_dtype_of
from distill.stages.quantize.mixed import choose_grids, logits_of
from distill.stages.quantize.spec import Quantize
from distill.stages.session import StageContext
from distill.stages.train import train
from distill.training.assemble import assemble, disassemble
from distill.training.trainer import resolve_device


def run(stage: Quantize, context: StageContext) -> dict[str, Any]:
    """Prepare, train, convert; then compare the packed model with the trained one."""
    location = context.session.artifact(stage.student).location
    if low_bit_scheme(load_config(location)):
        raise InputError(f"{stage.student}: its weights are low-bit already; quantize the model that it was made from")
    check_vocabulary(context, location)
    if stage.trains():
        stage.check_steps(context.session.corpus().steps_of(stage))
    # a scan needs the weights in each process, to find the same grids
    start = load_model(location, dtype="float32") if stage.mixed else load_trainable(context, location)
    is_read = start.device.type != "meta"  # else what the first process makes of it is sent
    mask = hold_mask(context, stage.student, start, lora=stage.lora is not None)
    filled = [grid.kind for grid in stage.every_grid() if not grid.keeps_zero]
    filled += [stage.rounding] if stage.rounding == "gptq" else []
    if mask is not None and filled:
        raise InputError(f"{stage.student}: its weights are masked ({mask}), and {filled[0]} would fill the zeros")
    layers = choose_grids(context, start, stage.quantizer, stage.mixed) if stage.mixed else stage.grids()
    if stage.equalize is not None and is_read:
        _equalize(context, start, stage.quantizer, layers, stage.equalize)
    untyped: Any = start
    width = untyped.get_input_embeddings().weight.shape[-1]
    student = assemble(
        start,
        quantizer=stage.quantizer,
        layers=layers,
        activations=stage.activations,
        embeddings=stage.embeddings_grid(width),
        kv_cache=stage.kv_cache,
        lora=stage.lora,
        gradient_checkpointing=context.session.compute.gradient_checkpointing and stage.trains(),
    )
    if stage.activations is not None and stage.activations.calibrated and is_read:
        _calibrate(context, student.model)
    if stage.rounding == "gptq" and is_read:
        _gptq(context, student.model)
    teacher = stage.taught_by()
    figures = train(
        context,
        student,
        stage.losses,
        stage,
        teacher=teacher,
        start=stage.student,
        quantized_from_step=stage.from_step,
        freeze_scales=stage.freeze_scales,
    )
    switch(student.model, enabled=True)
    model = move(disassemble(student), "cpu")  # merged where it was trained: elsewhere the bits may differ
    # a loader casts scales to the type of the folder, which must keep them
    kept = stored_dtype_of(location, "auto") == "float32"
    quantized = fake_quant_layers(model).values()
    grids = [layer.spec for layer in quantized if not layer.is_end]
    scales = {layer.spec.scale_dtype for layer in quantized}
    dtype = torch.float32 if kept or len(scales) > 1 else getattr(torch, scales.pop())
    round_unquantized(model, dtype)
    measured: dict[str, Any] = {}

    def write(folder: Path) -> None:
        size = save(model, folder, dtype=dtype)
        batches = context.session.corpus().validation_loader(batch_size=4, num_sequences=4)
        result = verify(model, folder, batches)
        measured.update(
            quantized_layers=len(grids), share_of_bfloat16=round(size.ratio, 4), verified_worst_kl=result.worst_kl
        )

    label = stage.label(width)
    context.write_model(
        write,
        parent=stage.student,
        teacher=context.session.teacher_behind(stage.student if teacher == SELF else teacher) if teacher else None,
        figures=figures | {"scheme": label, "gguf_type": stage.quantizer.gguf_type if not layers else None},
        mask=mask,
    )
    size, worst = measured["share_of_bfloat16"], measured["verified_worst_kl"]
    counts = Counter(grid.label() for grid in grids).most_common()
    each = "(" + "; ".join(f"{count} as {grid}" for grid, count in counts) + ")"
    ends = stage.embeddings_grid(width)
    scheme = each + (f" and embeddings as {ends.label()}" if ends else "") if stage.mixed else f"as {label}"
    context.say(f"{measured['quantized_layers']} layers {scheme}, {size:.3f} of their bf16 bytes")
    context.say(f"reloaded by plain transformers: worst KL to the trained model {worst:.1e}")
    return figures | measured | {"scheme": label}


def _equalize(
    context: StageContext,
    model: PreTrainedModel,
    quantizer: QuantizerSpec,
    layers: Layers,
    how: Literal["awq", "smooth_quant"],
) -> None:
    """Fold scales into a plain model, which computes what it did before."""
    batches = _calibration(context, model)
    prepare(model, quantizer, layers)
    norms = equalize(model, batches, partial(logits_of, model), how)
    unprepare(model)
    num_sequences = sum(len(batch["mask"]) for batch in batches)
    context.say(f"scales folded into {len(norms)} norms by {how} on {num_sequences} sequences")


def _calibrate(context: StageContext, model: PreTrainedModel) -> None:
    """Find the ranges of the activations on the run's calibration set."""
    batches = _calibration(context, model)
    found = calibrate(model, batches, partial(logits_of, model))
    num_sequences = sum(len(batch["mask"]) for batch in batches)
    context.say(f"ranges of the inputs of {len(found)} layers from {num_sequences} sequences")


def _gptq(context: StageContext, model: PreTrainedModel) -> None:
    """Round the weights on the run's calibration set."""
    batches = _calibration(context, model)
    rounded = gptq(model, batches, partial(logits_of, model))
    num_sequences = sum(len(batch["mask"]) for batch in batches)
    context.say(f"{len(rounded)} layers rounded by gptq on {num_sequences} sequences")


def _calibration(context: StageContext, model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """The run's calibration set, and the model moved to where it is to be read."""
    move(model, resolve_device(context.session.compute))
    return list(context.session.corpus().calibration_loader(batch_size=4))
