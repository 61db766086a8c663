"""Surgery: build the pruned model of a plan, a smaller model of the same class that plain transformers loads.

The model is built from the smaller config. Its weights are slices of the original weights, read one parameter at a
time; the original model is not changed. The pruned model computes exactly what the original model would if the outputs
of the removed units were zero.

Removing hidden channels needs a correction, because an RMSNorm divides by the root mean square over all d channels.
With d' channels left,

    mean_{d'} x^2 + eps d/d'  =  d/d' (mean_d x^2 + eps)      for x zero on the removed channels

so the output of the norm is unchanged if eps is multiplied by d/d' (the plan does this) and the weight by sqrt(d/d').
Three cases differ:

- A norm over the channels of each head reads the same eps (Qwen3): the projection before it is multiplied by sqrt(d/d')
  instead, which cancels in that norm.
- A LayerNorm is treated like an RMSNorm, but also subtracts the mean, which is now over the kept channels only.
- Embeddings that the model multiplies by sqrt(d) (Gemma) are multiplied by sqrt(d/d').

The layout marks all these parameters with ``rescaled``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.pruning.layout import FIXED_AXES, Dimension, Layout, Parameter, check, config_of, spans
from distill.pruning.plan import Plan
from distill.pruning.token_ids import renumbered

Read = Callable[[str], Tensor]
Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, plan: Plan, layout: Layout) -> Model:
    """Prune a model in memory.

    Args:
        model: a transformers language model; not changed. The result has its dtype, device, mode, attention
            implementation and generation config.
        plan: made by :func:`distill.pruning.plan.plan` for this model.
        layout: the layout of its architecture.

    Returns:
        The pruned model.

    Raises:
        InputError: the plan is for another model, or the layout does not fit the model.
        AssertionError: the result differs from the plan; a defect of the layout.
    """
    some = next(model.parameters())
    pruned = build_pruned_model(model, plan, layout, lambda name: model.get_parameter(name).detach(), some.dtype)
    return pruned.to(some.device)


def build_pruned_model(model: Model, plan: Plan, layout: Layout, read: Read, dtype: torch.dtype) -> Model:
    """Build the pruned model from weights that are read one at a time, from memory or from files.

    Args:
        model: gives the class, shapes, config, generation config and mode. Its weights are not read, so they may be on
            the device "meta".
        plan: made for this model.
        layout: the layout of its architecture.
        read: returns the value of a parameter of ``model``, given its name.
        dtype: of the pruned model.

    Returns:
        The pruned model, on the device of the weights that ``read`` returns.

    Raises:
        InputError: the plan is for another model, or the layout or the config class rejects it.
        AssertionError: the result differs from the plan; a defect of the layout.
    """
    if (sizes := check(model, layout)) != plan.before or layout.model_type != plan.model_type:
        raise InputError(
            f"the plan is for a {plan.model_type} with sizes {plan.before}, got a {layout.model_type} with {sizes}; "
            "make a plan for this model"
        )
    config = _smaller_config(model, plan)
    with torch.no_grad():
        weights = {
            name: cut(read(_old_name(parameter, layer, plan)).to(dtype), parameter, layer, plan, layout)
            for name, layer, parameter in stoppable(layout.named_parameters(config.to_dict()))
        }
    # from_pretrained fills an empty model, ties weights, and computes the buffers for the smaller config
    build: Any = type(model)
    pruned = build.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    pruned.name_or_path = pruned.config.name_or_path = config.name_or_path  # from_pretrained(None) sets "None"
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        settings = copy.deepcopy(generation)
        if plan.vocabulary is not None:
            settings.update(**renumbered(generation.to_dict(), plan.vocabulary))
            # transformers refuses to save a changed config with questionable settings, but only warns about an
            # unchanged one
            settings._original_object_hash = hash(settings)
        pruned.generation_config = settings
    pruned.train(model.training)
    _check_result(pruned, plan, layout)
    return cast(Model, pruned)


def _smaller_config(model: nn.Module, plan: Plan) -> Any:
    old: Any = model.config
    try:
        config = type(old).from_dict({**config_of(model), **plan.config})
    except ValueError as error:
        raise InputError(f"the config class of {plan.model_type} rejects the plan's sizes: {error}") from error
    config._attn_implementation = old._attn_implementation
    return config


def _old_name(parameter: Parameter, layer: int | None, plan: Plan) -> str:
    return parameter.path if layer is None else parameter.path.format(layer=plan.layers[layer])


def cut(weight: Tensor, parameter: Parameter, layer: int | None, plan: Plan, layout: Layout) -> Tensor:
    """The kept part of a parameter, as a new tensor.

    Args:
        weight: the original parameter.
        parameter: its entry in the layout.
        layer: index among the kept layers; None for parameters outside of layers.
        plan: the units that stay.
        layout: the layout of the architecture.
    """
    result = weight
    for dim, dimension in enumerate(parameter.axes):
        if parameter.axes[0] == "experts" and "mlp_neurons" in dimension:
            result = _cut_neurons_of_experts(result, dim, dimension, layer or 0, plan)
        else:
            merges = plan.merged_heads is not None and _produces_queries(parameter, layout)
            result = _cut_dimension(result, dim, dimension, layer, plan, merges=merges)
    if plan.group_choice == "silence" and parameter.path == f"{layout.attention_out}.weight":
        result = _zero_silent_heads(result, parameter, layer or 0, plan)
    if parameter.rescaled != "no" and plan.before["hidden_channels"] != plan.after["hidden_channels"]:
        # in fp32, so that a bfloat16 weight is rounded only once
        factor = sqrt(plan.before["hidden_channels"] / plan.after["hidden_channels"])
        one = 1.0 if parameter.rescaled == "one_plus_weight" else 0.0
        result = ((result.float() + one) * factor - one).to(weight.dtype)
    return result.clone() if result.data_ptr() == weight.data_ptr() else result.contiguous()


def _produces_queries(parameter: Parameter, layout: Layout) -> bool:
    """Whether the parameter is a projection into heads, or its bias, so that its head entries produce queries."""
    projects = len(parameter.axes) > 1 or parameter.path.endswith(".bias")
    return projects and parameter.path != f"{layout.attention_out}.weight"


def _entries(kept: Sequence[int], width: int, like: Tensor) -> Tensor:
    """Indices of the entries of the kept units, int64 [len(kept) * width]."""
    index = torch.tensor(kept, device=like.device, dtype=torch.long)  # [units]
    return (index.unsqueeze(1) * width + torch.arange(width, device=like.device)).flatten()


def _cut_dimension(
    weight: Tensor, dim: int, dimension: Dimension, layer: int | None, plan: Plan, *, merges: bool
) -> Tensor:
    """The kept entries along one dimension, span by span; with ``merges``, query heads are merged."""
    pieces = []
    for span in spans(dimension, plan.before):
        piece = weight.narrow(dim, span.start, span.length)
        kept = tuple(range(span.units)) if span.axis in FIXED_AXES else plan.kept(span.axis, layer)
        if kept != tuple(range(span.units)):
            original, piece = piece, piece.index_select(dim, _entries(kept, span.width, piece))
            if merges and span.axis == "attention_heads" and plan.merged_heads is not None:
                # head + (head - partner) = 2 head - partner; a head without a partner is its own and stays as it is
                partners = _entries(plan.merged_heads[layer or 0], span.width, original)
                wide = torch.promote_types(weight.dtype, torch.float32)
                piece = (2 * piece.to(wide) - original.index_select(dim, partners).to(wide)).to(weight.dtype)
        if span.axis == "kv_groups" and plan.group_choice == "pool":
            # dimension `dim` becomes [groups after, groups pooled into one, head_dim entries]
            pooled = piece.float().unflatten(dim, (plan.after["kv_groups"], -1, span.width))
            piece = pooled.mean(dim + 1).flatten(dim, dim + 1).to(weight.dtype)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _cut_neurons_of_experts(weight: Tensor, dim: int, dimension: Dimension, layer: int, plan: Plan) -> Tensor:
    """The kept neurons of each expert; ``weight`` [kept experts, ...] has already lost the removed experts."""
    if plan.before["mlp_neurons"] == plan.after["mlp_neurons"]:
        return weight
    # neuron n of expert e has the index e * neurons + n, so the remainder is n
    neurons = torch.tensor(plan.mlp_neurons[layer], device=weight.device) % plan.before["mlp_neurons"]
    per_expert = neurons.unflatten(0, (plan.after["experts"], -1))  # [experts, kept neurons]
    starts = [span.start for span in spans(dimension, plan.before)]  # two where gate and up are fused
    entries = torch.cat([per_expert + start for start in starts], 1)  # [experts, spans * kept neurons]
    return torch.stack([expert.index_select(dim - 1, kept) for expert, kept in zip(weight, entries, strict=True)])


def _zero_silent_heads(weight: Tensor, parameter: Parameter, layer: int, plan: Plan) -> Tensor:
    """The output projection with zeros in the entries that read silent heads."""
    dim, head_dim = parameter.axes.index("attention_heads"), plan.before["head_dim"]
    return weight.index_fill(dim, _entries(plan.silent_heads(layer), head_dim, weight), 0.0)


def _check_result(pruned: nn.Module, plan: Plan, layout: Layout) -> None:
    """Check that all parameters have the planned shape and a value, and that their number is that of the plan."""
    try:
        check(pruned, layout)
    except InputError as error:
        raise AssertionError(f"the pruned model differs from the plan: {error}") from error
    got = sum(parameter.numel() for parameter in pruned.parameters())
    if got != plan.parameters:
        raise AssertionError(f"the pruned model has {got:,} parameters, expected {plan.parameters:,} by the plan")
    if empty := [name for name, tensor in pruned.state_dict().items() if tensor.is_meta]:
        raise AssertionError(f"the pruned model has no weights for {', '.join(empty)}")
