"""The order in which a student is wrapped for training, and unwrapped afterwards. No other file does this.

    assemble       weights -> fake-quantized layers, KV cache -> gradient checkpointing -> LoRA adapters -> adapters
                   moved into the fake-quantized layers
    disassemble    adapters merged into the weights -> fake-quantized layers, ready for conversion

With fake quantization and LoRA together, the *merged* weight is quantized, because the exported model has that weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel

from distill.models.head import freeze_pooler
from distill.models.kv_cache import round_cache
from distill.models.lora import LoraSpec, add_lora, merge_lora
from distill.quantization.base import QuantizerSpec
from distill.quantization.fake_quant import fake_quant_layers
from distill.quantization.inputs import ActivationSpec
from distill.quantization.kv_cache import CacheType
from distill.quantization.lora import absorb_lora
from distill.quantization.prepare import prepare


@dataclass
class Student:
    """A student that is wrapped for training.

    Attributes:
        model: causal language model whose parameters are trained, with the wrapped layers.
        adapted: the peft wrapper around ``model``; None without LoRA.
    """

    model: PreTrainedModel
    adapted: PeftModel | None = None


def assemble(
    model: PreTrainedModel,
    *,
    quantizer: QuantizerSpec | None = None,
    layers: Sequence[tuple[str, QuantizerSpec]] = (),
    activations: ActivationSpec | None = None,
    embeddings: QuantizerSpec | None = None,
    kv_cache: CacheType | None = None,
    lora: LoraSpec | None = None,
    gradient_checkpointing: bool = False,
) -> Student:
    """Wrap a plain model for training, in place.

    For the arguments see :func:`~distill.quantization.prepare.prepare`, :mod:`distill.quantization.kv_cache` and
    :func:`~distill.models.lora.add_lora`.
    """
    model.requires_grad_(True)
    freeze_pooler(model)
    if quantizer is not None:
        prepare(model, quantizer, layers, activations, embeddings)
    if kv_cache is not None:
        round_cache(model, kv_cache)
    if gradient_checkpointing:
        _checkpointing(model, "enable", gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is None:
        return Student(model)
    adapted = add_lora(model, lora)
    if quantizer is not None:
        absorb_lora(adapted)
        for layer in fake_quant_layers(adapted).values():
            if layer.log_scale is not None:
                layer.log_scale.requires_grad_(True)  # add_lora froze it, but it is trained together with the adapters
    return Student(cast("PreTrainedModel", adapted.get_base_model()), adapted)


def disassemble(student: Student) -> PreTrainedModel:
    """Merge the adapters into the weights. The fake-quant layers stay, because the quantizer converts them."""
    model = student.model if student.adapted is None else merge_lora(student.adapted)
    _checkpointing(model, "disable")
    return model.eval()


def _checkpointing(model: PreTrainedModel, verb: str, **arguments: Any) -> None:
    """Call the method by its new or old name: transformers is renaming gradient to activation checkpointing."""
    name = f"activation_checkpointing_{verb}"
    if hasattr(model, name):
        arguments = {key.replace("gradient", "activation"): value for key, value in arguments.items()}
        getattr(model, name)(**arguments)
    else:
        getattr(model, f"gradient_checkpointing_{verb}")(**arguments)
