"""What pruning must know of an architecture: which axis every dimension of every parameter runs along.

One table serves all of pruning. Scoring reads from it which weights belong to a unit, planning how many parameters a
smaller config has, and surgery what to slice. A parameter that the table does not name is refused, never copied
blindly. The instances, one file an architecture, are in ``distill/models/layouts``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from distill.core.errors import InputError

if TYPE_CHECKING:
    from torch import nn

WIDTH_AXES = ("mlp_neurons", "attention_heads", "kv_groups", "hidden_channels")
AXES = (*WIDTH_AXES, "experts", "layers")
FIXED_AXES = ("head_dim", "positions", "token_types")
"""Axes that nothing cuts: the rotary frequencies and the positions that a model was trained on belong to them."""

HEAD_LABELS = {
    "attention_heads": ("attention_heads", 1),
    "kv_groups": ("kv_groups", 1),
    "qkv_heads": ("attention_heads", 3),
}
"""Label of a dimension with several entries a unit -> (its axis, entries a unit in multiples of ``head_dim``)."""

Dimension = str | tuple[str, ...]
Config = Mapping[str, Any]


class Span(NamedTuple):
    """A stretch of a dimension along one axis: unit ``u`` owns ``width`` entries from ``start + u * width`` on."""

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
    """One parameter, or the same one of every layer.

    Attributes:
        path: its name in the model; ``{layer}`` stands for the layer's index.
        axes: for each dimension an axis, or several axes whose stretches stand one after the other, as in a fused
            projection. A dimension along ``attention_heads`` or ``kv_groups`` holds ``head_dim`` entries a head;
            ``qkv_heads`` holds a head's query, key and value side by side. In a parameter whose first dimension is
            ``experts``, the ``mlp_neurons`` are those of each expert. See :func:`spans`.
        only_if: config key that must be true for the parameter to exist; None: it always does.
        unless: config key that must be false for the parameter to exist; None: it always does.
        grows: what is multiplied by sqrt(d / d') when hidden channels are cut from d to d': nothing, the weight, or one
            plus the weight, where the module adds that one (see surgery).
    """

    path: str
    axes: tuple[Dimension, ...]
    only_if: str | None = None
    unless: str | None = None
    grows: Literal["no", "weight", "one_plus_weight"] = "no"

    def exists(self, config: Config) -> bool:
        """Whether a model of this config has the parameter."""
        wanted = self.only_if is None or bool(config.get(self.only_if))
        return wanted and not (self.unless is not None and config.get(self.unless))


HiddenRule = Literal["free", "multiple_of_heads", "heads_times_head_dim"]


@dataclass(frozen=True)
class Layout:
    """Where one architecture keeps its layers, heads, neurons and channels.

    Attributes:
        model_type: the config's ``model_type``.
        parameters: every parameter of the language model; tied ones once.
        size_keys: axis -> config key that holds its size, or several keys of which the first one present counts. An
            axis that the architecture lacks is not there; one whose size follows from others may be left out:
            ``kv_groups`` equal the heads, ``head_dim`` is hidden size / heads.
        body: module that turns token ids into hidden states, without the output head.
        block: a layer; its input and output are hidden states [batch, sequence, hidden].
        reads: in a layer, the modules whose input is what attention and MLP read of the residual stream
            [batch, sequence, hidden].
        attention_out: module whose input is the heads' outputs [batch, sequence, heads * head_dim].
        mlp_down: module whose input is the MLP's neurons [batch, sequence, intermediate]; None in a mixture of experts.
        projections: "queries", "keys" and "values" -> module whose output is that of all heads side by side [batch,
            sequence, heads * head_dim]; empty where they have no modules of their own.
        experts: in a mixture of experts the module of all experts of a layer, called with hidden states
            [tokens, hidden], the chosen experts [tokens, k] and their weights [tokens, k]; its parameters are
            ``gate_up_proj`` and ``down_proj``. None elsewhere.
        norm_eps_key: config key of the norms' epsilon; None where the class fixes it.
        per_layer_keys: config keys that hold a list with one entry a layer.
        hidden_rule: what the config class demands of the hidden size: nothing, a multiple of the heads even when
            ``head_dim`` is given, or exactly heads x ``head_dim``. A function of the config where it depends on it.
        neurons_per_channel: MLP neurons for each hidden channel where the config's size is null.
        expects: config key -> the one value that the layout describes; missing keys count as that value.
        pinned_tokens: config keys of token ids that cutting the vocabulary may not move.
        task: what the model predicts: the next token, or masked ones (an encoder).
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
    task: Literal["causal_lm", "masked_lm"] = "causal_lm"

    def key(self, axis: str, config: Config) -> str | None:
        """The config key that holds an axis' size; None if the size follows from others."""
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
                raise InputError(f"{self.model_type} with {key} {config[key]!r} cannot be pruned (expected {value!r})")
        found: dict[str, Any] = {axis: config.get(self.key(axis, config) or "") for axis in self.size_keys}
        hidden, heads = found["hidden_channels"], found["attention_heads"]
        # As the config classes do: absent or null means "derived".
        if found.get("kv_groups") is None:
            found["kv_groups"] = heads
        if found.get("head_dim") is None and hidden and heads:
            found["head_dim"] = hidden // heads
        if found["mlp_neurons"] is None and self.neurons_per_channel and hidden:
            found["mlp_neurons"] = self.neurons_per_channel * hidden
        for axis, size in found.items():
            if not isinstance(size, int) or size < 1:
                what = self.key(axis, config) or axis
                raise InputError(f"the config's {what} is {size!r}, expected a whole number above 0")
        if heads % found["kv_groups"]:
            raise InputError(
                f"the config has {heads} attention heads for {found['kv_groups']} KV groups, "
                "expected a multiple; such a model cannot be pruned"
            )
        return found

    def resized(self, config: Config, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The config keys to change so that a model has these sizes; a size is stated where it would be derived.

        Raises:
            InputError: the config cannot say one of the sizes.
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
        """What the config class demands of the hidden size of this config."""
        return self.hidden_rule(config) if callable(self.hidden_rule) else self.hidden_rule

    def named_parameters(self, config: Config) -> Iterator[tuple[str, int | None, Parameter]]:
        """(name, layer or None, row of the table) of every parameter that a model of this config has."""
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
        """Number of parameters of a model of this config; tied ones counted once."""
        sizes = self.sizes(config)
        rows = [p for p in self.parameters if p.exists(config)]
        return sum((sizes["layers"] if "{layer}" in p.path else 1) * prod(shape(p, sizes)) for p in rows)


def spans(dimension: Dimension, sizes: Mapping[str, int]) -> list[Span]:
    """The stretches of a dimension, in order, under these axis sizes; most dimensions have one."""
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
                f"expected {expected.get(name, 'no such parameter')}; prune a plain language model, "
                "before adapters or quantization go in"
            )
    return sizes
