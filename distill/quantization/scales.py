"""What becomes of scales as a training goes on: learned ones begin where rounding does, all stand still near its end.

**Renewed.** A scale is learned from the step on at which the model begins to round. What it was when the model was
prepared fits the weights of then, and two bits of weights that have trained since are lost on it.

**Held**, so that the codes settle:

    scale, zero_point = those of the weight at that step;   from then on  code = clamp(round(w / scale) + zero_point)

A scale that is measured anew at every step moves all codes of its group whenever its largest weight moves. Held, a
weight that grows beyond the range clips, and gets no gradient there but from what brings the loss down inside: hold
late, when the learning rate is small. Ternary and binary grids pass their gradient everywhere, as they always do. A
learned scale gets no gradient any more, and what an optimizer's momentum still makes of it is not looked at. GGUF's own
quantizers divide by a scale before it is stored in fp16; a held one is the stored one, so that holding moves the few
codes that lie between the two (under 1 % of Q8_0's).

Source: Nagel et al. 2022, arXiv 2203.08086 (why codes go to and fro at the end of a training); observers are switched
off like this in ``torch.ao.quantization``.
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
def renew_scales(model: nn.Module) -> None:
    """Set every learned scale to what the grid finds best for the weight, adapters included, as it is now; in place.

    Weights that are shared out among ranks are gathered for it, a layer at a time: all ranks must call it.
    """
    for layer, weight in _weights(model):
        if layer.log_scale is not None and (scale := layer.spec.initial_scale(_whole(weight))) is not None:
            layer.log_scale.copy_(_shared_as(layer.log_scale, scale.log().flatten()))


@torch.no_grad()
def hold_scales(model: nn.Module) -> None:
    """Keep the scale of every fake-quantized layer as its weight, adapters included, has it now; in place.

    Weights that are shared out among ranks are gathered for it, a layer at a time: all ranks must call it.
    """
    for layer, weight in _weights(model):
        log_scale = None if layer.log_scale is None else _whole(layer.log_scale)
        layer.hold(codes_of(_whole(weight), layer.spec, log_scale, None))


def expect_held(model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> bool:
    """Make room for the held scales of a ``state_dict`` that is about to be loaded.

    Args:
        model: prepared as the one that was saved.
        state: name -> tensor.
        prefix: of the model's names in it.

    Returns:
        Whether there are any.
    """
    layers, found = fake_quant_layers(model), False
    for name, layer in layers.items():
        for leaf in HELD:
            if (saved := state.get(f"{prefix}{name}.{leaf}")) is not None:
                setattr(layer, leaf, torch.empty_like(saved, device=layer.weight.device))
                found = True
    return found


def _weights(model: nn.Module) -> Iterator[tuple[FakeQuantLayer, Tensor]]:
    """Every fake-quantized layer and the weight that it rounds: its own, with its adapter's share."""
    adapted: dict[int, Any] = {id(m.base_layer): m for m in model.modules() if hasattr(m, "lora_A")}
    for layer in fake_quant_layers(model).values():
        yield layer, merged_weight(adapted[id(layer)]) if id(layer) in adapted else layer.weight


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that ranks may share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shared_as(like: Tensor, full: Tensor) -> Tensor:
    """A tensor that every rank has whole, as ranks share ``like``."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
