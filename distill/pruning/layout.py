"""What pruning must know of an architecture: which axis every dimension of every parameter runs along.

One table serves all of pruning. Scoring reads from it which weights belong to a unit, planning how many parameters a
smaller config has, and surgery what to slice. A parameter that the table does not name is refused, never copied
blindly. The instances, one file an architecture, are in ``distill/models/layouts``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError

if TYPE_CHECKING:
    from torch import nn

WIDTH_AXES = ("mlp_neurons", "attention_heads", "kv_groups", "hidden_channels")
AXES = (*WIDTH_AXES, "layers")
HEAD_AXES = ("attention_heads", "kv_groups")


@dataclass(frozen=True)
class Parameter:
    """One parameter, or the same one of every layer.

    Attributes:
        path: its name in the model; ``{layer}`` stands for the layer's index.
        axes: the axis of each dimension: one of ``WIDTH_AXES``, ``head_dim`` or ``vocabulary``. A dimension along
            ``attention_heads`` or ``kv_groups`` holds ``head_dim`` entries a head, one head after the other.
        only_if: config key that must be true for the parameter to exist; None: it always does.
        unless: config key that must be false for the parameter to exist; None: it always does.
        follows_norm_eps: multiply by sqrt(d / d') when hidden channels are cut from d to d' (see surgery).
    """

    path: str
    axes: tuple[str, ...]
    only_if: str | None = None
    unless: str | None = None
    follows_norm_eps: bool = False

    def exists(self, config: Mapping[str, Any]) -> bool:
        """Whether a model of this config has the parameter."""
        wanted = self.only_if is None or bool(config.get(self.only_if))
        return wanted and not (self.unless is not None and config.get(self.unless))


@dataclass(frozen=True)
class Layout:
    """Where one architecture keeps its layers, heads, neurons and channels.

    Attributes:
        model_type: the config's ``model_type``.
        parameters: every parameter of the causal language model; tied ones once.
        size_keys: axis -> config key that holds its size; every axis, and ``head_dim`` and ``vocabulary``.
        body: module that turns token ids into hidden states, without the output head.
        block: a layer; its input and output are hidden states [batch, sequence, hidden].
        mlp_down: module whose input is the MLP's neurons [batch, sequence, intermediate].
        attention_out: module whose input is the heads' outputs [batch, sequence, heads * head_dim].
        norms: in a layer, the norms whose outputs feed attention and MLP.
        norm_eps_key: config key of the RMSNorms' epsilon.
        per_layer_keys: config keys that hold a list with one entry a layer.
        hidden_divisible_by_heads: the config class refuses a hidden size that the number of heads does not divide,
            even when ``head_dim`` is given.
        projections: "queries", "keys" and "values" -> module whose output is that of all heads side by side [batch,
            sequence, heads * head_dim]; empty where they have no modules of their own.
    """

    model_type: str
    parameters: tuple[Parameter, ...]
    size_keys: Mapping[str, str]
    body: str
    block: str
    mlp_down: str
    attention_out: str
    norms: tuple[str, ...]
    norm_eps_key: str
    per_layer_keys: tuple[str, ...]
    hidden_divisible_by_heads: bool
    projections: Mapping[str, str] = field(default_factory=dict)

    def sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Size of every axis, from ``config.to_dict()`` or a parsed ``config.json``.

        Raises:
            InputError: the config is of another architecture or lacks a size.
        """
        if config.get("model_type") != self.model_type:
            raise InputError(f"the config's model_type is {config.get('model_type')!r}, expected {self.model_type!r}")
        sizes = {axis: config.get(key) for axis, key in self.size_keys.items()}
        # As the config classes do: absent or null means "derived".
        if sizes["kv_groups"] is None:
            sizes["kv_groups"] = sizes["attention_heads"]
        if sizes["head_dim"] is None and sizes["hidden_channels"] and sizes["attention_heads"]:
            sizes["head_dim"] = sizes["hidden_channels"] // sizes["attention_heads"]
        for axis, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise InputError(f"the config's {self.size_keys[axis]} is {size!r}, expected a whole number above 0")
        found = {axis: int(size) for axis, size in sizes.items() if size is not None}
        if found["attention_heads"] % found["kv_groups"]:
            raise InputError(
                f"the config has {found['attention_heads']} attention heads for {found['kv_groups']} KV groups, "
                "expected a multiple; such a model cannot be pruned"
            )
        return found

    def named_parameters(self, config: Mapping[str, Any]) -> Iterator[tuple[str, int | None, Parameter]]:
        """(name, layer or None, row of the table) of every parameter that a model of this config has."""
        for parameter in self.parameters:
            if not parameter.exists(config):
                continue
            if "{layer}" not in parameter.path:
                yield parameter.path, None, parameter
                continue
            for layer in range(self.sizes(config)["layers"]):
                yield parameter.path.format(layer=layer), layer, parameter

    def count(self, config: Mapping[str, Any]) -> int:
        """Number of parameters of a model of this config; tied ones counted once."""
        sizes = self.sizes(config)
        rows = [p for p in self.parameters if p.exists(config)]
        return sum((sizes["layers"] if "{layer}" in p.path else 1) * prod(shape(p, sizes)) for p in rows)


def shape(parameter: Parameter, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a parameter under these axis sizes."""
    return tuple(sizes[axis] * (sizes["head_dim"] if axis in HEAD_AXES else 1) for axis in parameter.axes)


def config_of(model: nn.Module) -> dict[str, Any]:
    """A transformers model's config as plain data."""
    config: Any = model.config
    return dict(config.to_dict())


def check(model: nn.Module, layout: Layout) -> dict[str, int]:
    """Make sure that the layout tells the whole truth about a model: every parameter named, every shape as expected.

    Returns:
        size of every axis.

    Raises:
        InputError: a parameter too many, too few, or of another shape.
    """
    config = config_of(model)
    sizes = layout.sizes(config)
    expected = {name: shape(parameter, sizes) for name, _, parameter in layout.named_parameters(config)}
    got = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise InputError(
                f"{layout.model_type}: parameter {name} is {got.get(name, 'missing')}, "
                f"expected {expected.get(name, 'no such parameter')}; prune a plain causal language model, "
                "before adapters or quantization go in"
            )
    return sizes
