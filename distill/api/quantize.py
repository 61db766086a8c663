"""Quantize a model in memory: after training, or as the start of a training with quantized weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from distill.api.batches import Batch, on_device
from distill.api.spec import checked
from distill.core.errors import InputError
from distill.quantization.base import QuantizerSpec
from distill.quantization.calibrate import calibrate
from distill.quantization.embeddings import EmbeddingsKind
from distill.quantization.equalize import equalize as fold
from distill.quantization.gptq import gptq
from distill.quantization.inputs import ActivationSpec
from distill.quantization.prepare import prepare, unprepare
from distill.stages.quantize.mixed import logits_of
from distill.stages.quantize.spec import Quantize

Model = TypeVar("Model", bound=PreTrainedModel)
Settings = Mapping[str, Any] | str


def quantize(
    model: Model,
    quantizer: QuantizerSpec | Settings = "int_group",
    *,
    layers: Sequence[tuple[str, QuantizerSpec | Settings]] = (),
    activations: ActivationSpec | Settings | None = None,
    embeddings: EmbeddingsKind | None = None,
    rounding: Literal["nearest", "gptq"] = "nearest",
    equalize: Literal["awq", "smooth_quant"] | None = None,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    inplace: bool = False,
) -> Model:
    """Make a model compute with low-bit weights.

    The result computes with the weights that :func:`distill.export` will store, to the last bit. Its parameters keep
    their full precision, so it can be trained further: in a :class:`~distill.training.module.DistillationModule` this
    is quantization-aware training (the gradient passes the rounding unchanged, arXiv 1308.3432). Without training it
    is post-training quantization.

    Args:
        model: a causal language model that is not quantized yet.
        quantizer: the grid of the weights: its name, such as ``"int_group"``, ``"q4_0"`` or ``"fp8"``, or its settings,
            such as ``{"kind": "int_group", "bits": 4, "group_size": 64}``.
        layers: other grids for some layers, as (pattern, quantizer), such as ``("*.down_proj", "int8_channel")``.
        activations: the grid of the layers' inputs, such as ``"dynamic_int8"``; None leaves them as they are.
        embeddings: the grid of embeddings and output head, as the key ``embeddings`` of the stage.
        rounding: ``"gptq"`` chooses codes by their error on ``calibration`` (arXiv 2210.17323).
        equalize: fold scales of the input channels into the norms first (arXiv 2306.00978, 2211.10438).
        calibration: batches, as :func:`distill.batches` makes them; needed by ``rounding="gptq"``, ``equalize`` and
            static activations.
        inplace: whether to change ``model`` itself. If False a copy is made, which needs its memory again.

    Returns:
        The model with quantized layers.

    Raises:
        InputError: a group size does not fit a layer, a pattern matches none, a setting has no effect, or
            ``calibration`` is missing.

    Examples:
        >>> import distill
        >>> teacher, tokenizer = distill.load("builtin:quickstart-teacher")
        >>> low_bit = distill.quantize(teacher, {"kind": "int_group", "group_size": 32})
        >>> type(low_bit.model.layers[0].mlp.up_proj).__name__
        'FakeQuantLinear'
    """
    grids = [{"match": match, "quantizer": grid} for match, grid in layers]
    settings = {"activations": activations, "embeddings": embeddings, "equalize": equalize, "rounding": rounding}
    given = {key: value for key, value in settings.items() if value is not None}
    learned = _is_learned([quantizer, *(grid for _, grid in layers)])
    budget = {"num_steps": 1, "batch_size": 1} if learned else {"num_tokens": 0}  # the scale is trained by the caller
    stage = checked(Quantize, {"student": "model", "quantizer": quantizer, "layers": grids, **given, **budget}, "")
    needs = [f"rounding={rounding!r}"] if stage.rounding == "gptq" else []
    needs += [f"equalize={equalize!r}"] if stage.equalize is not None else []
    needs += ["static activations"] if stage.activations is not None and stage.activations.calibrated else []
    if needs and calibration is None:
        raise InputError(f"calibration: is missing, and {needs[0]} needs it; give batches of distill.batches")
    if not needs and calibration is not None:
        raise InputError(
            "calibration: has no effect on this quantizer; remove it, or set rounding='gptq', equalize or static "
            "activations"
        )
    read: list[Batch] = []
    if calibration is not None:
        read = on_device(calibration, next(model.parameters()).device)
    made = model if inplace else copy.deepcopy(model)
    made.requires_grad_(True)  # it may have been a teacher, which is frozen
    untyped: Any = made
    width = untyped.get_input_embeddings().weight.shape[-1]
    if stage.equalize is not None:
        prepare(made, stage.quantizer, stage.grids())
        fold(made, read, partial(logits_of, made), stage.equalize)
        unprepare(made)
    prepare(made, stage.quantizer, stage.grids(), stage.activations, stage.embeddings_grid(width))
    if stage.activations is not None and stage.activations.calibrated:
        calibrate(made, read, partial(logits_of, made))
    if stage.rounding == "gptq":
        gptq(made, read, partial(logits_of, made))
    return made


def _is_learned(grids: Iterable[Any]) -> bool:
    """Whether a grid has scales that a training must find."""
    scales = (grid.get("scale") if isinstance(grid, Mapping) else getattr(grid, "scale", None) for grid in grids)
    return "learned" in scales
