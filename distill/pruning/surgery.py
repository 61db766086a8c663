"""Surgery: from a model and a plan to a new, smaller model of the same class, which plain transformers loads.

The new model is built from the smaller config and its weights are slices of the old ones, read one parameter at a
time; the old model is not touched. What remains computes exactly what the old model would with the removed units'
outputs held at zero.

Hidden channels need care, since an RMSNorm divides by the root mean square over all d of them. With only d' left

    mean_{d'} x^2 + eps d/d'  =  d/d' (mean_d x^2 + eps)      for x zero on the removed channels

so the norm's output is as before if eps is multiplied by d/d' (the plan does so) and the weight by sqrt(d/d'). Where a
norm over each head's channels reads the same eps (Qwen3), the projection before it is multiplied by sqrt(d/d') instead,
which that norm takes out again. A LayerNorm is treated alike; it also centres, over the channels that stay. Embeddings
that the model multiplies by sqrt(d) (Gemma) are multiplied by sqrt(d/d'). The layout marks all these parameters with
``grows``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, TypeVar, cast

from distill.core.errors import InputError
from distill.pruning.layout import FIXED_AXES, Dimension, Layout, Parameter, check, config_of, spans
from distill.pruning.plan import Plan
from distill.pruning.tokens import renumbered

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Read = Callable[[str], Tensor]

Model = TypeVar("Model", bound="nn.Module")


def apply(model: Model, plan: Plan, layout: Layout) -> Model:
    """Cut a model in memory down to a plan.

    Args:
        model: a transformers language model; unchanged afterwards. Dtype, device, mode, attention implementation and
            generation config carry over.
        plan: made by :func:`distill.pruning.plan.plan` for this model.
        layout: the layout of its architecture.

    Raises:
        InputError: the plan is for another model, or the layout does not fit the model.
        AssertionError: the result is not what the plan forecast; a defect of the layout.
    """
    some = next(model.parameters())
    pruned = carve(model, plan, layout, lambda name: model.get_parameter(name).detach(), some.dtype)
    return pruned.to(some.device)


def carve(model: Model, plan: Plan, layout: Layout, read: Read, dtype: torch.dtype) -> Model:
    """The pruned model, from weights that are read one at a time and may lie anywhere.

    Args:
        model: stands for the model that is cut: its class, shapes, config, generation config and mode; its weights are
            not read and may be on the device "meta".
        plan: made for this model.
        layout: the layout of its architecture.
        read: name of a parameter of ``model`` -> its value.
        dtype: of the pruned model.

    Raises:
        InputError: the plan is for another model, or the layout or the config class refuses it.
        AssertionError: the result is not what the plan forecast; a defect of the layout.
    """
    import torch

    if (sizes := check(model, layout)) != plan.before or layout.model_type != plan.model_type:
        raise InputError(
            f"the plan is for a {plan.model_type} of {plan.before}, got {sizes}; make a plan of this model"
        )
    config = _smaller_config(model, plan)
    with torch.no_grad():
        weights = {
            name: cut(read(_old_name(parameter, layer, plan)).to(dtype), parameter, layer, plan, layout)
            for name, layer, parameter in layout.named_parameters(config.to_dict())
        }
    # The loader of transformers fills an empty model, ties what is tied and computes the buffers of the smaller config.
    build: Any = type(model)
    pruned = build.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    pruned.name_or_path = pruned.config.name_or_path = config.name_or_path  # "None", after the file that there was not
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        pruned.generation_config = copy.deepcopy(generation)
        if plan.vocabulary is not None:
            pruned.generation_config.update(**renumbered(generation.to_dict(), plan.vocabulary))
    pruned.train(model.training)
    _check_result(pruned, plan, layout)
    return cast(Model, pruned)


def _smaller_config(model: nn.Module, plan: Plan) -> Any:
    old: Any = model.config
    try:
        config = type(old).from_dict({**config_of(model), **plan.config})
    except ValueError as error:
        raise InputError(f"the config class of {plan.model_type} refuses the plan: {error}") from error
    config._attn_implementation = old._attn_implementation
    return config


def _old_name(parameter: Parameter, layer: int | None, plan: Plan) -> str:
    return parameter.path if layer is None else parameter.path.format(layer=plan.layers[layer])


def cut(weight: Tensor, parameter: Parameter, layer: int | None, plan: Plan, layout: Layout) -> Tensor:
    """The part of a parameter that stays, in memory of its own.

    Args:
        weight: the unpruned parameter.
        parameter: its row of the layout's table.
        layer: counts the layers that stay; None outside of them.
        plan: what stays.
        layout: the layout of the architecture.
    """
    result = weight
    for dim, dimension in enumerate(parameter.axes):
        if parameter.axes[0] == "experts" and "mlp_neurons" in dimension:
            result = _cut_neurons_of_experts(result, dim, dimension, layer or 0, plan)
        else:
            merges = plan.merged_heads is not None and _asks(parameter, layout)
            result = _cut_dimension(result, dim, dimension, layer, plan, merges=merges)
    if plan.group_choice == "silence" and parameter.path == f"{layout.attention_out}.weight":
        result = _silenced(result, parameter, layer or 0, plan)
    if parameter.grows != "no" and plan.before["hidden_channels"] != plan.after["hidden_channels"]:
        # In fp32, so that a bfloat16 weight is rounded once.
        factor = sqrt(plan.before["hidden_channels"] / plan.after["hidden_channels"])
        one = 1.0 if parameter.grows == "one_plus_weight" else 0.0
        result = ((result.float() + one) * factor - one).to(weight.dtype)
    return result.clone() if result.data_ptr() == weight.data_ptr() else result.contiguous()


def _asks(parameter: Parameter, layout: Layout) -> bool:
    """Whether the heads' entries of a parameter make their queries: a projection into heads, or its bias."""
    projects = len(parameter.axes) > 1 or parameter.path.endswith(".bias")
    return projects and parameter.path != f"{layout.attention_out}.weight"


def _entries(kept: Sequence[int], width: int, like: Tensor) -> Tensor:
    import torch

    index = torch.tensor(kept, device=like.device, dtype=torch.long)
    return (index.unsqueeze(1) * width + torch.arange(width, device=like.device)).flatten()


def _cut_dimension(
    weight: Tensor, dim: int, dimension: Dimension, layer: int | None, plan: Plan, *, merges: bool
) -> Tensor:
    """The entries along one dimension that stay, stretch by stretch; those of query heads merged where ``merges``."""
    import torch

    pieces = []
    for span in spans(dimension, plan.before):
        piece = weight.narrow(dim, span.start, span.length)
        kept = tuple(range(span.units)) if span.axis in FIXED_AXES else plan.kept(span.axis, layer)
        if kept != tuple(range(span.units)):
            whole, piece = piece, piece.index_select(dim, _entries(kept, span.width, piece))
            if merges and span.axis == "attention_heads" and plan.merged_heads is not None:
                others = _entries(plan.merged_heads[layer or 0], span.width, whole)
                wide = torch.promote_types(weight.dtype, torch.float32)
                piece = (2 * piece.to(wide) - whole.index_select(dim, others).to(wide)).to(weight.dtype)
        if span.axis == "kv_groups" and plan.group_choice == "pool":
            runs = piece.float().unflatten(dim, (plan.after["kv_groups"], -1, span.width))
            piece = runs.mean(dim + 1).flatten(dim, dim + 1).to(weight.dtype)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _cut_neurons_of_experts(weight: Tensor, dim: int, dimension: Dimension, layer: int, plan: Plan) -> Tensor:
    """The neurons that stay of each expert that stays; ``weight`` holds those experts alone."""
    import torch

    if plan.before["mlp_neurons"] == plan.after["mlp_neurons"]:
        return weight
    neurons = torch.tensor(plan.mlp_neurons[layer], device=weight.device) % plan.before["mlp_neurons"]
    rows = neurons.unflatten(0, (plan.after["experts"], -1))
    starts = [span.start for span in spans(dimension, plan.before)]
    entries = torch.cat([rows + start for start in starts], 1)
    return torch.stack([expert.index_select(dim - 1, kept) for expert, kept in zip(weight, entries, strict=True)])


def _silenced(weight: Tensor, parameter: Parameter, layer: int, plan: Plan) -> Tensor:
    """The output projection with zeros where silent heads enter."""

    dim, head_dim = parameter.axes.index("attention_heads"), plan.before["head_dim"]
    return weight.index_fill(dim, _entries(plan.silent_heads(layer), head_dim, weight), 0.0)


def _check_result(pruned: nn.Module, plan: Plan, layout: Layout) -> None:
    """Hold the pruned model against the plan: every parameter of the expected shape and filled, as many as forecast."""
    try:
        check(pruned, layout)
    except InputError as error:
        raise AssertionError(f"the pruned model is not what the plan says: {error}") from error
    got = sum(parameter.numel() for parameter in pruned.parameters())
    if got != plan.parameters:
        raise AssertionError(f"the pruned model has {got:,} parameters, the plan forecast {plan.parameters:,}")
    if empty := [name for name, tensor in pruned.state_dict().items() if tensor.is_meta]:
        raise AssertionError(f"the pruned model has no weights for {', '.join(empty)}")
