"""Put fake-quantization into a model, and take it out again."""

from __future__ import annotations

from typing import cast

from torch import nn

from distill.core.errors import InputError
from distill.quantization.base import DEFAULT_SKIP, QuantizerSpec, matches
from distill.quantization.fake_quant import FakeQuantLinear, fake_quant_layers


def prepare(model: nn.Module, spec: QuantizerSpec) -> list[str]:
    """Make the linear layers compute with quantized weights, in place; nothing is changed when it raises.

    Only plain ``nn.Linear`` layers: a subclass may read its weight in ways of its own.

    Returns:
        Dotted names of the layers, in the model's order.

    Raises:
        InputError: no layer to quantize, a skip pattern that fits no layer, a grid that does not fit a layer, a weight
            that another module shares, adapters or quantization already there.
    """
    _refuse_wrapped(model)
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for pattern in spec.skip:
        if pattern not in DEFAULT_SKIP and not any(matches(pattern, name) for name in linear):
            raise InputError(
                f"skip: {pattern!r} fits no linear layer (they are called {_examples(list(linear))}); mend or remove it"
            )
    chosen = {name: layer for name, layer in linear.items() if not spec.skips(name)}
    if not chosen:
        raise InputError(f"nothing to quantize: skip leaves out all of the model's {len(linear)} linear layers")
    _refuse_shared(model, chosen)
    for name, layer in chosen.items():
        try:
            spec.groups(layer.in_features)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    for layer in chosen.values():
        # a change of class, not of object: hooks, tied parameters and whoever holds the layer stay as they are
        layer.__class__ = FakeQuantLinear
        prepared = cast(FakeQuantLinear, layer)
        prepared.spec, prepared.enabled = spec, True
    return list(chosen)


def unprepare(model: nn.Module) -> list[str]:
    """Undo :func:`prepare`, in place: plain linear layers with the full-precision weights.

    Returns:
        Dotted names of the layers.
    """
    layers = fake_quant_layers(model)
    for layer in layers.values():
        del layer.spec, layer.enabled
        layer.__class__ = nn.Linear  # type: ignore[assignment]
    return list(layers)


def _refuse_wrapped(model: nn.Module) -> None:
    if fake_quant_layers(model):
        raise InputError("the model is fake-quantized already; take that out first (unprepare)")
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise InputError("the model has adapters already: prepare it first, then add them, then absorb_lora")
    if any(hasattr(module, "quantization_scheme") for module in model.modules()):
        raise InputError("the model's weights are quantized already; start from the model that it was made from")


def _refuse_shared(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    """A weight with two owners would be quantized in one place and not in the other, and could not be stored so."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        other = owners.setdefault(id(weight), name)
        if other != name and (name in chosen or other in chosen):
            layer = name if name in chosen else other
            shares = other if name in chosen else name
            raise InputError(
                f"{layer} shares its weight with {shares} and cannot be quantized alone; add {layer!r} to skip"
            )


def _examples(names: list[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "nothing: there are none"
