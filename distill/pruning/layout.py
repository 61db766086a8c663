"""The layout of an architecture: for every dimension of every parameter, the axis that it runs along.

All of pruning reads this one table: scoring finds the weights that belong to a unit, planning counts the parameters of
a smaller config, and surgery finds what to slice. A parameter that is not in the table is an error; it is never copied
unchanged. The layouts are in ``distill/models/layouts``, one file per architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from distill.core.errors import InputError
from distill.core.tasks import Head

if TYPE_CHECKING:
    from torch import nn

WIDTH_AXES = ("mlp_neurons", "attention_heads", "kv_groups", "hidden_channels")
AXES = (*WIDTH_AXES, "experts", "layers")
FIXED_AXES = ("head_dim", "positions", "token_types", "classes")
"""Axes that are never cut: rotary frequencies and learned positions depend on them, and a class is an answer."""

HEAD_LABELS = {
    "attention_heads": ("attention_heads", 1),
    "kv_groups": ("kv_groups", 1),
    "qkv_heads": ("attention_heads", 3),
}
"""Label of a dimension with several entries per unit -> (its axis, entries per unit in multiples of ``head_dim``)."""

Dimension = str | tuple[str, ...]
Config = Mapping[str, Any]


class Span(NamedTuple):
    """A contiguous part of a dimension along one axis; unit ``u`` has ``width`` entries from ``start + u * width``."""

    axis: str
    start: int
    units: int
    width: int

    @property
    def length(self) -> int:
        """Number of entries."""
        return self.units * self.width


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, or the parameter of this name in every layer.

    Attributes:
        path: its name in the model, with ``{layer}`` in place of the layer's index.
        axes: the axis of each dimension, or a tuple of axes for a fused dimension whose parts are concatenated. A
            dimension along ``attention_heads`` or ``kv_groups`` has ``head_dim`` entries per head; ``qkv_heads`` has
            the query, key and value of one head next to each other. In a parameter whose first dimension is
            ``experts``, ``mlp_neurons`` are the neurons of one expert. See :func:`spans`.
        only_if: config key that must be true for the parameter to exist; None: no such condition.
        unless: config key that must be false for the parameter to exist; None: no such condition.
        rescaled: what is multiplied by sqrt(d / d') when hidden channels are cut from d to d': nothing, the weight, or
            one plus the weight for a module that adds one to its weight (see :mod:`distill.pruning.surgery`).
    """

    path: str
    axes: tuple[Dimension, ...]
    only_if: str | None = None
    unless: str | None = None
    rescaled: Literal["no", "weight", "one_plus_weight"] = "no"

    def exists(self, config: Config) -> bool:
        """Whether a model with this config has the parameter."""
        required = self.only_if is None or bool(config.get(self.only_if))
        return required and not (self.unless is not None and config.get(self.unless))


HiddenRule = Literal["free", "multiple_of_heads", "heads_times_head_dim"]


@dataclass(frozen=True)
class Layout:
    """The parameters and modules of one architecture.

    Module paths are relative to the model and have ``{layer}`` in place of the layer's index.

    Attributes:
        model_type: the config's ``model_type``.
        parameters: every parameter of the language model; tied ones once.
        size_keys: axis -> config key of its size, or several keys of which the first that is present is read. Omit an
            axis that the architecture does not have. Omit ``kv_groups`` where they equal the heads, and ``head_dim``
            where it is hidden size / heads.
        body: module that maps token ids to hidden states, without the output head.
        block: one layer; its input and output are hidden states [batch, sequence, hidden].
        reads: the modules of a layer through which attention and MLP read the residual stream; their input is
            [batch, sequence, hidden].
        attention_out: module whose input is the heads' outputs [batch, sequence, heads * head_dim].
        mlp_down: module whose input is the MLP neurons [batch, sequence, intermediate]; None in a mixture of experts.
        projections: "queries", "keys" and "values" -> module whose output is that of all heads
            [batch, sequence, heads * head_dim]; empty for a fused projection.
        experts: the module that holds all experts of a layer in a mixture of experts, else None. It is called with
            hidden states [tokens, hidden], the selected experts [tokens, k] and their weights [tokens, k], and has the
            parameters ``gate_up_proj`` and ``down_proj``.
        norm_eps_key: config key of the norms' epsilon; None if the class fixes it.
        per_layer_keys: config keys that hold a list with one entry per layer.
        hidden_rule: what the config class requires of the hidden size: nothing, a multiple of the heads even if
            ``head_dim`` is given, or exactly heads x ``head_dim``. A function of the config where the rule depends on
            it.
        neurons_per_channel: MLP neurons per hidden channel, for configs whose intermediate size is null.
        expects: config key -> the only value that the layout supports; a missing key counts as that value.
        pinned_tokens: config keys of token ids that must not change when the vocabulary is cut.
        task: what the model predicts: the next token, or another head (an encoder).
        embeddings: module whose output is the input of the first layer; None where it is not one module.
    """

    model_type: str
    parameters: tuple[Parameter, ...]
    size_keys: Mapping[str, str | tuple[str, ...]]
    body: str
    block: str
    reads: tuple[str, ...]
    attention_out: str
    mlp_down: str | None
    projections: Mapping[str, str] = field(default_factory=dict)
    experts: str | None = None
    norm_eps_key: str | None = "rms_norm_eps"
    per_layer_keys: tuple[str, ...] = ()
    hidden_rule: HiddenRule | Callable[[Config], HiddenRule] = "free"
    neurons_per_channel: int | None = None
    expects: Mapping[str, Any] = field(default_factory=dict)
    pinned_tokens: tuple[str, ...] = ()
    task: Head = "causal_lm"
    embeddings: str | None = None

    def key(self, axis: str, config: Config) -> str | None:
        """The config key that holds the size of an axis; None if it is derived from other sizes."""
        keys = self.size_keys.get(axis)
        if keys is None or isinstance(keys, str):
            return keys
        return next((key for key in keys if key in config), keys[0])

    def sizes(self, config: Config) -> dict[str, int]:
        """Size of every axis, from ``config.to_dict()`` or a parsed ``config.json``.

        Raises:
            InputError: the config is of another architecture, lacks a size, or is of a variant that the layout does
                not describe.
        """
        if config.get("model_type") != self.model_type:
            raise InputError(f"the config's model_type is {config.get('model_type')!r}, expected {self.model_type!r}")
        for key, value in self.expects.items():
            if config.get(key, value) not in (value, None):
                raise InputError(
                    f"pruning {self.model_type} with {key} {config[key]!r} is not supported (expected {value!r})"
                )
        found: dict[str, Any] = {axis: config.get(self.key(axis, config) or "") for axis in self.size_keys}
        self._refuse(config, {axis: size for axis, size in found.items() if size is not None})
        hidden, heads = found["hidden_channels"], found["attention_heads"]
        # as in the config classes, absent or null means "derived"
        if found.get("kv_groups") is None:
            found["kv_groups"] = heads
        if found.get("head_dim") is None and hidden and heads:
            found["head_dim"] = hidden // heads
        if any("classes" in parameter.axes for parameter in self.parameters):
            found["classes"] = len(config.get("id2label") or (0, 1))  # transformers leaves its default of two out
        if found["mlp_neurons"] is None and self.neurons_per_channel and hidden:
            found["mlp_neurons"] = self.neurons_per_channel * hidden
        self._refuse(config, found)
        if heads % found["kv_groups"]:
            raise InputError(
                f"the config has {heads} attention heads for {found['kv_groups']} KV groups, "
                "expected a multiple; pruning such a model is not supported"
            )
        return found

    def _refuse(self, config: Config, sizes: Mapping[str, Any]) -> None:
        for axis, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                what = self.key(axis, config) or axis
                raise InputError(f"the config's {what} is {size!r}, expected a positive integer")

    def resized(self, config: Config, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The config keys to change so that a model has these sizes.

        A size that the config class would otherwise derive with another value is written explicitly.

        Raises:
            InputError: the config has no key for one of the sizes.
        """
        changes: dict[str, Any] = {}
        for axis in self.size_keys:
            if (key := self.key(axis, config)) and config.get(key) is not None and config[key] != sizes[axis]:
                changes[key] = sizes[axis]
        derived = self.sizes({**config, **changes})
        for axis in (axis for axis in sizes if derived[axis] != sizes[axis]):
            key = self.key(axis, config)
            if key is None:
                raise InputError(
                    f"the config of {self.model_type} has no key for {axis}: it would be {derived[axis]}, "
                    f"not {sizes[axis]}"
                )
            changes[key] = sizes[axis]
        return changes

    def rule_of_hidden(self, config: Config) -> HiddenRule:
        """What the config class requires of the hidden size of this config."""
        return self.hidden_rule(config) if callable(self.hidden_rule) else self.hidden_rule

    def named_parameters(self, config: Config) -> Iterator[tuple[str, int | None, Parameter]]:
        """(name, layer or None, entry of ``parameters``) of every parameter of a model with this config."""
        layers = self.sizes(config)["layers"]
        for parameter in self.parameters:
            if not parameter.exists(config):
                continue
            if "{layer}" not in parameter.path:
                yield parameter.path, None, parameter
                continue
            for layer in range(layers):
                yield parameter.path.format(layer=layer), layer, parameter

    def count(self, config: Config) -> int:
        """Number of parameters of a model with this config; tied ones counted once."""
        sizes = self.sizes(config)
        rows = [p for p in self.parameters if p.exists(config)]
        return sum((sizes["layers"] if "{layer}" in p.path else 1) * prod(shape(p, sizes)) for p in rows)


def spans(dimension: Dimension, sizes: Mapping[str, int]) -> list[Span]:
    """The spans of a dimension under these axis sizes, in order; a dimension that is not fused has one."""
    found: list[Span] = []
    for label in (dimension,) if isinstance(dimension, str) else dimension:
        axis, head_dims = HEAD_LABELS.get(label, (label, 0))
        start = found[-1].start + found[-1].length if found else 0
        found.append(Span(axis, start, sizes[axis], head_dims * sizes["head_dim"] or 1))
    return found


def shape(parameter: Parameter, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a parameter under these axis sizes."""
    return tuple(sum(span.length for span in spans(dimension, sizes)) for dimension in parameter.axes)


def config_of(model: nn.Module) -> dict[str, Any]:
    """The config of a transformers model as a dict, with the name of its class, which tells its head."""
    config: Any = model.config
    return {**config.to_dict(), "architectures": [type(model).__name__]}


def check(model: nn.Module, layout: Layout) -> dict[str, int]:
    """Check that the layout describes a model completely: the names and shapes of all parameters agree.

    Returns:
        The size of every axis.

    Raises:
        InputError: a parameter is missing, unexpected, or has another shape.
    """
    config = config_of(model)
    sizes = layout.sizes(config)
    expected = {name: shape(parameter, sizes) for name, _, parameter in layout.named_parameters(config)}
    got = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise InputError(
                f"{layout.model_type}: parameter {name} is {got.get(name, 'missing')}, "
                f"expected {expected.get(name, 'no such parameter')}; prune a plain language model, without adapters "
                "or quantized layers"
            )
    return sizes
