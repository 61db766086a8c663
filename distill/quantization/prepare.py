"""Put fake-quantization into a model, and take it out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from distill.core.errors import InputError
from distill.quantization.base import DEFAULT_SKIP, QuantizerSpec, matches
from distill.quantization.fake_quant import (
    FakeQuantEmbedding,
    FakeQuantLayer,
    FakeQuantLinear,
    InputQuantLinear,
    fake_quant_layers,
)
from distill.quantization.inputs import ActivationSpec

Layers = Sequence[tuple[str, QuantizerSpec]]
"""Grids of their own for some layers: (pattern as in skip, grid); the first pattern that fits decides."""


def prepare(
    model: nn.Module, spec: QuantizerSpec, layers: Layers = (), activations: ActivationSpec | None = None
) -> list[str]:
    """Make linear layers, and embeddings if asked, compute with quantized weights; in place, or not at all.

    Args:
        model: a plain model.
        spec: the grid, and what it leaves alone.
        layers: other grids for some of the layers; their own skip and include have no effect.
        activations: the grid of the inputs of all these linear layers; a static one is to be calibrated next.

    Returns:
        Dotted names of the layers, in the model's order.

    Raises:
        InputError: no layer to quantize, a pattern that fits no layer, a grid that does not fit a layer, weights that
            are neither skipped nor held by a linear layer, a weight that another module shares, adapters or
            quantization already there.
    """
    _refuse_wrapped(model)
    chosen = _choose(model, spec, layers)
    _refuse_shared(model, chosen)
    modules = dict(model.named_modules())
    for name, grid in chosen.items():
        try:
            grid.groups(cast(nn.Linear, modules[name]).weight.shape[-1])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    for name, grid in chosen.items():
        _wrap(modules[name], grid, activations)
    return list(chosen)


def unprepare(model: nn.Module) -> list[str]:
    """Undo :func:`prepare`, in place: plain layers with the full-precision weights.

    Returns:
        Dotted names of the layers.
    """
    layers = fake_quant_layers(model)
    for layer in layers.values():
        del layer.spec, layer.enabled, layer.log_scale, layer.held_scale, layer.held_zero_point
        if isinstance(layer, FakeQuantLinear):
            del layer.inputs, layer.input_scale
        layer.__class__ = nn.Linear if isinstance(layer, FakeQuantLinear) else nn.Embedding  # type: ignore[assignment]
    return list(layers)


def _wrap(module: nn.Module, spec: QuantizerSpec, activations: ActivationSpec | None) -> None:
    """A change of class, not of object: hooks, tied parameters and whoever holds the layer stay as they are."""
    module.__class__ = FakeQuantLinear if type(module) is nn.Linear else FakeQuantEmbedding
    layer = cast(FakeQuantLayer, module)
    layer.spec, layer.enabled = spec, True
    scale = spec.initial_scale(layer.weight)
    layer.register_parameter("log_scale", None if scale is None else nn.Parameter(scale.log().flatten()))
    layer.register_buffer("held_scale", None)
    layer.register_buffer("held_zero_point", None)
    if isinstance(layer, FakeQuantLinear):
        quantize_input(layer, activations)


def quantize_input(layer: InputQuantLinear, activations: ActivationSpec | None) -> None:
    """Have a layer round its input; a scale that is to be calibrated is 1 until then."""
    layer.inputs = activations
    calibrated = activations is not None and activations.calibrated
    layer.register_buffer("input_scale", torch.ones(1, device=layer.weight.device) if calibrated else None)


def _choose(model: nn.Module, spec: QuantizerSpec, layers: Layers) -> dict[str, QuantizerSpec]:
    """The grid of every layer that has one."""
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
                    f"{key}: {pattern!r} fits no {kind} (they are called {_examples(names)}); mend or remove it"
                )
    for name, parameters in others.items():
        if not spec.skips(name):
            raise InputError(
                f"{name} ({type(modules[name]).__name__}) holds weights outside of linear layers "
                f"({', '.join(parameters)}), which cannot be quantized; add {name.rpartition('.')[2]!r} to skip to "
                "ship them as they are"
            )
    wanted = [name for name in linear if not spec.skips(name)]
    wanted += [name for name in embeddings if any(matches(pattern, name) for pattern in spec.include)]
    if not wanted:
        raise InputError(f"nothing to quantize: skip leaves out all of the model's {len(linear)} linear layers")
    chosen = {name: _grid_of(name, spec, layers) for name in modules if name in set(wanted)}
    for pattern, grid in layers:
        if not any(found is grid for found in chosen.values()):
            raise InputError(f"layers: {pattern!r} fits only layers that skip or an earlier pattern takes; remove it")
    return chosen


def _grid_of(name: str, spec: QuantizerSpec, layers: Layers) -> QuantizerSpec:
    return next((grid for pattern, grid in layers if matches(pattern, name)), spec)


def _other_weights(model: nn.Module) -> dict[str, list[str]]:
    """Modules that hold matrices and are neither linear layers nor embeddings: experts, routers, GPT-2's Conv1D."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, nn.Embedding):  # Gemma's is one of its own
            continue
        if matrices := [leaf for leaf, tensor in module.named_parameters(recurse=False) if tensor.ndim >= 2]:
            found[name] = matrices
    return found


def _refuse_wrapped(model: nn.Module) -> None:
    if fake_quant_layers(model):
        raise InputError("the model is fake-quantized already; take that out first (unprepare)")
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise InputError("the model has adapters already: prepare it first, then add them, then absorb_lora")
    if any(hasattr(module, "quantization_scheme") for module in model.modules()):
        raise InputError("the model's weights are quantized already; start from the model that it was made from")


def _refuse_shared(model: nn.Module, chosen: dict[str, QuantizerSpec]) -> None:
    """A weight with two owners would be quantized in one place and not in the other, and could not be stored so."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.nn.Parameter):
            continue
        other = owners.setdefault(id(weight), name)
        if other != name and (name in chosen or other in chosen):
            embedding = next((n for n in (name, other) if isinstance(model.get_submodule(n), nn.Embedding)), None)
            layer = name if name in chosen else other
            shares = other if name in chosen else name
            mend = f"remove it from include, and add {shares!r} to skip" if layer == embedding else ""
            raise InputError(
                f"{layer} shares its weight with {shares}, and no format here stores a shared weight quantized; "
                + (mend or f"add {layer!r} to skip")
            )


def _examples(names: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "nothing: there are none"
