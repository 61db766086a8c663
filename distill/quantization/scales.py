"""Changes of scales during training: learned scales are reset when quantization starts, scales are fixed at the end.

**Reset.** Quantization may start after some steps of full-precision training. A learned scale is then set again from
the current weights, because its initial value fits the weights from before the training, and is too far off at 2 bits.

**Fixed** (held), so that the codes converge:

    scale, zero_point = those of the weight at that step;   from then on  code = clamp(round(w / scale) + zero_point)

A scale that is computed at every step changes all codes of its group whenever the largest weight of the group changes.
With a fixed scale, a weight that grows beyond the range is clipped and gets no gradient, so fix scales late, when the
learning rate is small. Ternary and binary grids still pass their gradient everywhere. A learned scale gets no gradient
after that step, and later updates by the optimizer's momentum are ignored. GGUF's quantizers divide by the fp32 scale
before it is rounded to fp16, whereas a fixed scale is already rounded; this changes the few codes between the two
(under 1 % for Q8_0).

Source: Nagel et al. 2022, arXiv 2203.08086 (oscillation of codes at the end of training); ``torch.ao.quantization``
disables observers in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.quantization.fake_quant import FakeQuantLayer, codes_of, fake_quant_layers
from distill.quantization.lora import merged_weight

HELD = ("held_scale", "held_zero_point")


@torch.no_grad()
def reset_learned_scales(model: nn.Module) -> None:
    """Set every learned scale to its initial value for the current weight, adapters included; in place.

    Sharded weights are gathered one layer at a time, so all ranks must call it.
    """
    for layer, weight in _weights(model):
        if layer.log_scale is not None and (scale := layer.spec.initial_scale(_full_tensor(weight))) is not None:
            layer.log_scale.copy_(_shard_like(layer.log_scale, scale.log().flatten()))


@torch.no_grad()
def hold_scales(model: nn.Module) -> None:
    """Fix the scale of every fake-quantized layer to that of its current weight, adapters included; in place.

    Sharded weights are gathered one layer at a time, so all ranks must call it.
    """
    for layer, weight in _weights(model):
        log_scale = None if layer.log_scale is None else _full_tensor(layer.log_scale)
        layer.hold(codes_of(_full_tensor(weight), layer.spec, log_scale, None))


def allocate_held_scales(model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> bool:
    """Allocate the buffers for the fixed scales in a ``state_dict`` that will be loaded next.

    Args:
        model: prepared in the same way as the saved model.
        state: name -> tensor.
        prefix: prefix of the model's names in ``state``.

    Returns:
        Whether the state has fixed scales.
    """
    layers, found = fake_quant_layers(model), False
    for name, layer in layers.items():
        for leaf in HELD:
            if (saved := state.get(f"{prefix}{name}.{leaf}")) is not None:
                setattr(layer, leaf, torch.empty_like(saved, device=layer.weight.device))
                found = True
    return found


def _weights(model: nn.Module) -> Iterator[tuple[FakeQuantLayer, Tensor]]:
    """Every fake-quantized layer and the weight that it quantizes: its own weight plus its adapters."""
    adapted: dict[int, Any] = {id(m.base_layer): m for m in model.modules() if hasattr(m, "lora_A")}
    for layer in fake_quant_layers(model).values():
        yield layer, merged_weight(adapted[id(layer)]) if id(layer) in adapted else layer.weight


def _full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard_like(like: Tensor, full: Tensor) -> Tensor:
    """``full``, which every rank has, sharded in the same way as ``like``."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
