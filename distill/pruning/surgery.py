"""Surgery: from a model and a plan to a new, smaller model of the same class, which plain transformers loads.

The new model is built from the smaller config and its weights are slices of the old ones; the old model is not touched.
What remains computes exactly what the old model would with the removed units' outputs held at zero.

Hidden channels need care, since an RMSNorm divides by the root mean square over all d of them. With only d' left

    mean_{d'} x^2 + eps d/d'  =  d/d' (mean_d x^2 + eps)      for x zero on the removed channels

so the norm's output is as before if eps is multiplied by d/d' (the plan does so) and the weight by sqrt(d/d'). Where a
norm over each head's channels reads the same eps (Qwen3), the projection before it is multiplied by sqrt(d/d') instead,
which that norm takes out again. The layout marks all these parameters with ``follows_norm_eps``.
"""

from __future__ import annotations

import copy
from math import sqrt
from typing import TYPE_CHECKING, Any, TypeVar, cast

from distill.core.errors import InputError
from distill.pruning.layout import HEAD_AXES, Layout, Parameter, check, config_of
from distill.pruning.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

Model = TypeVar("Model", bound="nn.Module")


def apply(model: Model, plan: Plan, layout: Layout) -> Model:
    """Cut a model down to a plan.

    Args:
        model: a transformers causal language model; unchanged afterwards. Dtype, device, mode, attention
            implementation and generation config carry over.
        plan: made by :func:`distill.pruning.plan.plan` for this model.
        layout: the layout of its architecture.

    Raises:
        InputError: the plan is for another model, or the layout does not fit the model.
        AssertionError: the result is not what the plan forecast; a defect of the layout.
    """
    import torch

    if (sizes := check(model, layout)) != plan.before or layout.model_type != plan.model_type:
        raise InputError(
            f"the plan is for a {plan.model_type} of {plan.before}, got {sizes}; make a plan of this model"
        )
    old_config: Any = model.config
    config = type(old_config).from_dict({**config_of(model), **plan.config})
    config._attn_implementation = old_config._attn_implementation
    build: Any = type(model)
    with torch.device("meta"):  # nothing is drawn at random only to be overwritten
        pruned = build(config)
    with torch.no_grad():
        _fill(pruned, model, plan, layout)
    pruned.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        pruned.generation_config = copy.deepcopy(model.generation_config)
    pruned.train(model.training)
    _check_result(pruned, plan)
    return cast(Model, pruned)


def _fill(pruned: nn.Module, model: nn.Module, plan: Plan, layout: Layout) -> None:
    """Give the empty model its slices of the old one's parameters, and the old one's buffers."""
    weights = {}
    for name, layer, parameter in layout.named_parameters(config_of(pruned)):
        old_name = name if layer is None else parameter.path.format(layer=plan.layers[layer])
        weights[name] = _cut(model.get_parameter(old_name), parameter, layer, plan)
    # A tied parameter has a second name, which stays empty until the weights are tied again.
    second_names = pruned.state_dict().keys() - dict(pruned.named_parameters()).keys()
    missing, unexpected = pruned.load_state_dict(weights, strict=False, assign=True)
    if unexpected or not set(missing) <= second_names:
        raise AssertionError(f"the layout of {plan.model_type} does not fill {missing} and names {unexpected}")
    old_buffers = dict(model.named_buffers())
    for name, buffer in pruned.named_buffers():
        # Rotary frequencies depend on head_dim alone, and no axis cuts that; the old ones are also never on "meta".
        old = old_buffers.get(name)
        if old is None or old.shape != buffer.shape or name.startswith(layout.block.split("{")[0]):
            raise AssertionError(f"the layout of {plan.model_type} does not know how to fill the buffer {name}")
        path, _, last = name.rpartition(".")
        setattr(pruned.get_submodule(path), last, old.clone())


def _cut(weight: Tensor, parameter: Parameter, layer: int | None, plan: Plan) -> Tensor:
    """The slice of a parameter that stays; ``layer`` counts the layers that stay."""
    import torch

    result = weight.detach()
    for dim, axis in enumerate(parameter.axes):
        if axis in ("vocabulary", "head_dim"):
            continue
        kept = getattr(plan, axis) if axis == "hidden_channels" else getattr(plan, axis)[layer]
        index = torch.tensor(kept, device=weight.device)
        if axis in HEAD_AXES:
            within = torch.arange(plan.before["head_dim"], device=weight.device)
            index = (index.unsqueeze(1) * plan.before["head_dim"] + within).flatten()
        result = result.index_select(dim, index)
    if parameter.follows_norm_eps and plan.before["hidden_channels"] != plan.after["hidden_channels"]:
        # In fp32, so that a bfloat16 weight is rounded once.
        factor = sqrt(plan.before["hidden_channels"] / plan.after["hidden_channels"])
        result = (result.float() * factor).to(weight.dtype)
    return result.clone(memory_format=torch.contiguous_format)


def _check_result(pruned: nn.Module, plan: Plan) -> None:
    got = sum(parameter.numel() for parameter in pruned.parameters())
    if got != plan.parameters:
        raise AssertionError(f"the pruned model has {got:,} parameters, the plan forecast {plan.parameters:,}")
    if empty := [name for name, tensor in pruned.state_dict().items() if tensor.is_meta]:
        raise AssertionError(f"the pruned model has no weights for {', '.join(empty)}")
