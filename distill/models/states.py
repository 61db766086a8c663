"""Intermediate outputs of a model's layers, for losses on hidden states and attention.

They are recorded by hooks on the required modules, because ``output_hidden_states`` would keep every layer in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.losses.layer_losses import Pair, Shape, StateLossSpec
from distill.models.layouts import LAYOUTS, find_layout
from distill.pruning.layout import config_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

State = tuple[str, int]
"""(part of a layer, index of the layer); the part is "block" for the layer's output, or a projection of attention."""


@dataclass(frozen=True)
class Shapes:
    """The intermediate outputs of a model that can be recorded.

    Attributes:
        num_layers: number of layers.
        parts: part of a layer -> (number of heads, channels per head).
        paths: part of a layer -> path of its module, with ``{layer}`` for the layer's index.
        is_causal: whether a token attends to earlier tokens only.
    """

    num_layers: int
    parts: dict[str, Shape]
    paths: dict[str, str]
    is_causal: bool = True

    @property
    def hidden_size(self) -> int:
        """Channels of the hidden states."""
        return self.parts["block"][1]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shapes:
        """From ``config.to_dict()`` or a parsed ``config.json``.

        Raises:
            InputError: there is no layout for the architecture.
        """
        layout = find_layout(config)
        if layout is None:
            raise InputError(
                f"model_type {config.get('model_type')!r} has no layout, which losses on hidden states and "
                "attention need "
                f"(expected one of {', '.join(LAYOUTS)})"
            )
        sizes = layout.sizes(config)
        heads = {"queries": sizes["attention_heads"], "keys": sizes["kv_groups"], "values": sizes["kv_groups"]}
        parts = {part: (heads[part], sizes["head_dim"]) for part in layout.projections}
        paths = {"block": layout.block, **layout.projections}
        return cls(
            sizes["layers"], {"block": (1, sizes["hidden_channels"]), **parts}, paths, layout.task == "causal_lm"
        )


def pairs_of(
    loss: StateLossSpec, student: Shapes, teacher: Shapes, kept: Sequence[int] | None = None
) -> tuple[Pair, ...]:
    """The pairs of layers that a loss compares; see :meth:`StateLossSpec.pairs`.

    Raises:
        InputError: the loss cannot compare these two models.
    """
    for part in loss.parts:
        if part not in student.parts or part not in teacher.parts:
            raise InputError(
                f"{loss.kind}: needs a separate projection for {part}, which this architecture does not have; use "
                "another loss"
            )
        loss.between(student.parts[part], teacher.parts[part])
    return loss.pairs(student.num_layers, teacher.num_layers, kept)


class States:
    """Records intermediate outputs of a model, also with adapters and fake-quantized layers.

    Args:
        model: causal language model, wrapped or not. The hooks are permanent and do nothing outside of
            :meth:`recording`; they must be registered before compilation, because a compiled model ignores later hooks.

    Attributes:
        shapes: the outputs that can be recorded.

    Raises:
        InputError: there is no layout for the architecture.
    """

    def __init__(self, model: PreTrainedModel):
        self.shapes = Shapes.of(config_of(model))
        self._model = model
        self._seen: dict[State, Tensor] = {}
        self._watched: set[State] = set()
        self._on = False

    def watch(self, states: Iterable[State]) -> None:
        """Also record these states, from the next recording on."""
        for part, layer in set(states) - self._watched:
            module = self._model.get_submodule(self.shapes.paths[part].format(layer=layer))
            module.register_forward_hook(partial(self._keep, (part, layer)))
            self._watched.add((part, layer))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inside the context; the recomputation of gradient checkpointing happens outside of it."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def take(self) -> dict[State, Tensor]:
        """Return the states of the last recording, [batch, sequence, width] each, and release them.

        Raises:
            InputError: a module was not called.
        """
        seen, self._seen = self._seen, {}
        for part, layer in sorted(self._watched - seen.keys()):
            raise InputError(
                f"the output {part!r} of layer {layer} was not recorded, which happens with compilation and gradient "
                "checkpointing together; disable one of them, or remove the loss that needs it"
            )
        return seen

    def _keep(self, state: State, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._on:
            self._seen[state] = output[0] if isinstance(output, tuple) else output
