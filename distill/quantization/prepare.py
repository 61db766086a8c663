"""Turn the layers of a model into fake-quantized layers, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from distill.core.errors import InputError
from distill.quantization.base import DEFAULT_SKIP, Layers, QuantizerSpec, grid_of, matches
from distill.quantization.fake_quant import (
    FakeQuantLayer,
    FakeQuantLinear,
    InputQuantLinear,
    fake_quant_embedding,
    fake_quant_layers,
)
from distill.quantization.inputs import ActivationSpec


def prepare(
    model: nn.Module,
    spec: QuantizerSpec,
    layers: Layers = (),
    activations: ActivationSpec | None = None,
    embeddings: QuantizerSpec | None = None,
) -> list[str]:
    """Make linear layers, and embeddings where they are wanted, compute with quantized weights, in place.

    A weight that several modules share, such as a tied head's, is quantized in all of them as soon as it is in one. If
    an error is raised, the model is not changed.

    Args:
        model: a plain model.
        spec: the quantizer, with the layers that it skips and the embeddings that it includes.
        layers: other quantizers for some of the layers; their own skip and include have no effect.
        activations: the quantizer of the inputs of all these linear layers, except a head with a shared weight or the
            grid of ``embeddings``; a static one must be calibrated next.
        embeddings: the quantizer of the input embeddings and the output head, where neither ``spec`` nor ``layers``
            quantizes them; None: they stay as they are.

    Returns:
        Dotted names of the layers, in the model's order.

    Raises:
        InputError: there is no layer to quantize, a pattern matches no layer, a group size does not fit a layer, a
            matrix outside of linear layers is not skipped, a shared weight cannot be quantized in all modules alike,
            or the model has adapters or is quantized already.
    """
    _refuse_wrapped(model)
    modules = dict(model.named_modules())
    chosen = _choose(model, spec, layers)
    # an end that the patterns choose keeps their grid, and so does the one that shares its weight
    taken = {id(modules[name].weight) for name in chosen}
    ends = {name: grid for name, grid in _ends(model, embeddings).items() if id(modules[name].weight) not in taken}
    chosen |= ends
    ends |= (shared := _sharing(modules, chosen))
    chosen |= shared
    chosen = {name: chosen[name] for name in modules if name in chosen}
    for name, grid in chosen.items():
        try:
            grid.groups(cast(nn.Linear, modules[name]).weight.shape[-1])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    weights = [id(modules[name].weight) for name in chosen]
    tied = {weight for weight in weights if weights.count(weight) > 1}
    scales: dict[int, nn.Parameter | None] = {}  # a shared weight has one learned scale
    for name, grid in chosen.items():
        is_end = name in ends or id(modules[name].weight) in tied
        _wrap(modules[name], grid, None if is_end else activations, scales)
        cast(FakeQuantLayer, modules[name]).is_end = is_end
    return list(chosen)


def unprepare(model: nn.Module) -> list[str]:
    """Undo :func:`prepare`, in place: the layers become plain layers with the full-precision weights.

    Returns:
        Dotted names of the layers.
    """
    layers = fake_quant_layers(model)
    for layer in layers.values():
        del layer.spec, layer.enabled, layer.is_end, layer.log_scale, layer.held_scale, layer.held_zero_point
        if isinstance(layer, FakeQuantLinear):
            del layer.inputs, layer.input_scale
        plain = nn.Linear if isinstance(layer, FakeQuantLinear) else getattr(layer, "plain", nn.Embedding)
        layer.__class__ = plain  # type: ignore[assignment]
    return list(layers)


def _wrap(
    module: nn.Module,
    spec: QuantizerSpec,
    activations: ActivationSpec | None,
    scales: dict[int, nn.Parameter | None],
) -> None:
    """Change the class of the module and not the object, so that hooks, tied parameters and references stay valid."""
    is_linear = type(module) is nn.Linear
    module.__class__ = FakeQuantLinear if is_linear else fake_quant_embedding(cast(Any, type(module)))
    layer = cast(FakeQuantLayer, module)
    layer.spec, layer.enabled = spec, True
    if id(layer.weight) not in scales:
        scale = spec.initial_scale(layer.weight)
        scales[id(layer.weight)] = None if scale is None else nn.Parameter(scale.log().flatten())
    layer.register_parameter("log_scale", scales[id(layer.weight)])
    layer.register_buffer("held_scale", None)
    layer.register_buffer("held_zero_point", None)
    if isinstance(layer, FakeQuantLinear):
        quantize_input(layer, activations)


def quantize_input(layer: InputQuantLinear, activations: ActivationSpec | None) -> None:
    """Set the activation quantizer of a layer; a scale that needs calibration is 1 until then."""
    layer.inputs = activations
    calibrated = activations is not None and activations.calibrated
    layer.register_buffer("input_scale", torch.ones(1, device=layer.weight.device) if calibrated else None)


def _choose(model: nn.Module, spec: QuantizerSpec, layers: Layers) -> dict[str, QuantizerSpec]:
    """The quantizer of every layer that gets one, by name."""
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if type(module) is nn.Linear]
    embeddings = [name for name, module in modules.items() if type(module) is nn.Embedding]
    others = _other_weights(model)
    for key, patterns, names in (
        ("skip", [pattern for pattern in spec.skip if pattern not in DEFAULT_SKIP], [*linear, *others]),
        ("include", spec.include, embeddings),
        ("layers", [pattern for pattern, _ in layers], [*linear, *embeddings]),
    ):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                kind = "embedding" if key == "include" else "linear layer"
                raise InputError(
                    f"{key}: {pattern!r} matches no {kind} (the model has {_examples(names)}); fix or remove it"
                )
    for name, parameters in others.items():
        if not spec.skips(name):
            raise InputError(
                f"{name} ({type(modules[name]).__name__}) has weights outside of linear layers "
                f"({', '.join(parameters)}), which cannot be quantized; add {name.rpartition('.')[2]!r} to skip to "
                "store them unquantized"
            )
    wanted = [name for name in linear if not spec.skips(name)]
    wanted += [name for name in embeddings if any(matches(pattern, name) for pattern in spec.include)]
    if not wanted:
        raise InputError(
            f"there is no layer to quantize: skip matches all {len(linear)} linear layers of the model; "
            "remove a pattern from skip"
        )
    chosen = {name: grid_of(name, spec, layers) for name in modules if name in set(wanted)}
    for pattern, grid in layers:
        if not any(found is grid for found in chosen.values()):
            raise InputError(
                f"layers: {pattern!r} matches only layers that skip or an earlier pattern matches; remove it"
            )
    return chosen


def _other_weights(model: nn.Module) -> dict[str, list[str]]:
    """Modules with matrices that are neither linear layers nor embeddings: experts, routers, GPT-2's Conv1D."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, nn.Embedding):  # Gemma's is one of its own
            continue
        if matrices := [leaf for leaf, tensor in module.named_parameters(recurse=False) if tensor.ndim >= 2]:
            found[name] = matrices
    return found


def _refuse_wrapped(model: nn.Module) -> None:
    if fake_quant_layers(model):
        raise InputError("the model is fake-quantized already; call unprepare first")
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise InputError("the model has adapters already; call prepare first, then add adapters, then call absorb_lora")
    if any(hasattr(module, "quantization_scheme") for module in model.modules()):
        raise InputError("the model's weights are quantized already; use the model before its quantization")


def _ends(model: nn.Module, grid: QuantizerSpec | None) -> dict[str, QuantizerSpec]:
    """The input embeddings and the output head of a transformers model, by name, with their grid; {} without a grid.

    Raises:
        InputError: one of them is a module that cannot be fake-quantized.
    """
    if grid is None or not hasattr(model, "get_input_embeddings"):
        return {}
    untyped: Any = model
    ends = [untyped.get_input_embeddings(), untyped.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    for name in names:
        if not _can_wrap(module := model.get_submodule(name)):
            raise InputError(
                f"{name} ({type(module).__name__}) is neither a linear layer nor a plain embedding, so it cannot be "
                "quantized; set embeddings: keep"
            )
    return dict.fromkeys(names, grid)


def _can_wrap(module: nn.Module) -> bool:
    """Whether a module can be fake-quantized: a linear layer, or an embedding whose forward calls nn.Embedding's."""
    if type(module) in (nn.Linear, nn.Embedding):
        return True
    code = getattr(type(module).forward, "__code__", None)
    return isinstance(module, nn.Embedding) and code is not None and {"super", "forward"} <= {*code.co_names}


def _sharing(modules: dict[str, nn.Module], chosen: dict[str, QuantizerSpec]) -> dict[str, QuantizerSpec]:
    """The other modules that use the weights of the chosen ones, with the same grids: both uses read the same codes.

    Raises:
        InputError: one of them cannot be quantized, or two of them have different grids.
    """
    owners: dict[int, str] = {}
    for name in chosen:
        weight = modules[name].weight
        other = owners.setdefault(id(weight), name)
        if chosen[other] != chosen[name]:
            raise InputError(
                f"{name} shares its weight with {other}, which has another grid ({chosen[other].label()}, "
                f"not {chosen[name].label()}); give both the same"
            )
    found: dict[str, QuantizerSpec] = {}
    for name, module in modules.items():
        owner = owners.get(id(getattr(module, "weight", None)))
        if owner is None or name in chosen:
            continue
        if not _can_wrap(module):
            raise InputError(
                f"{owner} shares its weight with {name} ({type(module).__name__}), which cannot be quantized; "
                f"add {owner.rpartition('.')[2]!r} to skip"
            )
        found[name] = chosen[owner]
    return found


def _examples(names: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
