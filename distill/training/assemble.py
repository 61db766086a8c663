"""The ONE order in which a student is wrapped, and unwrapped.

    weights -> fake-quant layers and cache -> LoRA on top of them -> adapters drawn into the fake-quant      (assemble)
    adapters merged into the weights -> fake-quant layers, ready to convert                         (disassemble)

With both, the fake-quant sees the *merged* weight, because that is what will be rounded when the model is shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from distill.models.lora import LoraSpec, add_lora, merge_lora
from distill.quantization.base import QuantizerSpec
from distill.quantization.inputs import ActivationSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from distill.quantization.kv_cache import CacheType


@dataclass
class Student:
    """A student that is ready to be trained.

    Attributes:
        model: the causal model whose parameters are trained (with whatever wraps its layers).
        adapted: the peft wrapper around it, or None without LoRA.
    """

    model: PreTrainedModel
    adapted: PeftModel | None = None


def assemble(
    model: PreTrainedModel,
    *,
    quantizer: QuantizerSpec | None = None,
    layers: Sequence[tuple[str, QuantizerSpec]] = (),
    activations: ActivationSpec | None = None,
    kv_cache: CacheType | None = None,
    lora: LoraSpec | None = None,
    gradient_checkpointing: bool = False,
) -> Student:
    """Wrap a plain model for training, in place; for the grids see :func:`~distill.quantization.prepare.prepare` and
    :mod:`distill.quantization.kv_cache`."""
    model.requires_grad_(True)
    if quantizer is not None:
        from distill.quantization.prepare import prepare

        prepare(model, quantizer, layers, activations)
    if kv_cache is not None:
        from distill.models.kv_cache import round_cache

        round_cache(model, kv_cache)
    if gradient_checkpointing:
        _checkpointing(model, "enable", gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is None:
        return Student(model)
    adapted = add_lora(model, lora)
    if quantizer is not None:
        from distill.quantization.fake_quant import fake_quant_layers
        from distill.quantization.lora import absorb_lora

        absorb_lora(adapted)
        for layer in fake_quant_layers(adapted).values():
            if layer.log_scale is not None:
                layer.log_scale.requires_grad_(True)  # as much a part of the adapter as its matrices
    return Student(cast("PreTrainedModel", adapted.get_base_model()), adapted)


def disassemble(student: Student) -> PreTrainedModel:
    """Fold adapters into the weights; fake-quant layers stay, for the quantizer to convert."""
    model = student.model if student.adapted is None else merge_lora(student.adapted)
    _checkpointing(model, "disable")
    return model.eval()


def _checkpointing(model: PreTrainedModel, verb: str, **arguments: Any) -> None:
    """transformers is renaming gradient checkpointing to activation checkpointing; both names are met."""
    name = f"activation_checkpointing_{verb}"
    if hasattr(model, name):
        arguments = {key.replace("gradient", "activation"): value for key, value in arguments.items()}
        getattr(model, name)(**arguments)
    else:
        getattr(model, f"gradient_checkpointing_{verb}")(**arguments)
