"""Low-rank adapters (LoRA) with peft: trained instead of the weights, and merged before a model is saved.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from distill.core.errors import InputError
from distill.core.spec import Spec

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


class LoraSpec(Spec):
    """Train low-rank adapters and keep the weights frozen."""

    r: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """Scale: the adapter's product is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input; 0 is off. Must be 0 under fake-quant."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: "all-linear" (all but the head), or the last parts of their names."""


def add_lora(model: PreTrainedModel, spec: LoraSpec) -> PeftModel:
    """Wrap a model with new adapters; only the adapters require gradients.

    Raises:
        InputError: no layer matches ``target_modules``, or a matching layer shares its weight with another layer.
    """
    from peft import LoraConfig, get_peft_model

    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=cast(int, spec.alpha),
        lora_dropout=spec.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    shared = _shared_weights(model)
    try:
        adapted = cast("PeftModel", get_peft_model(model, config))
    except ValueError as error:
        raise InputError(f"lora.target_modules: {str(error).splitlines()[0]}") from error
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_A") and (owners := shared.get(id(module.base_layer.weight))):
            raise InputError(
                f"lora.target_modules: {owners} share a weight, so an adapter on {name} cannot be merged; remove it"
            )
    return adapted


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Merge the adapters into the weights and unwrap the model."""
    return cast("PreTrainedModel", model.merge_and_unload())


def _shared_weights(model: PreTrainedModel) -> dict[int, str]:
    """The id of each weight that several modules share -> the names of the modules."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not None:
            owners.setdefault(id(module.weight), []).append(name)
    return {weight: " and ".join(names) for weight, names in owners.items() if len(names) > 1}


ADAPTER = "lora_"
"""Part of the name of every adapter parameter."""


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the context, the model computes without its adapters."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "lora_A") and not layer.disable_adapters]
    try:
        for layer in layers:
            # not enable_adapters(), which also changes requires_grad, possibly between forward and backward
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
