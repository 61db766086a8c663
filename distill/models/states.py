"""What the layers of a model put out on the way, for losses that compare more than its predictions.

By hooks on the wanted modules alone, not by ``output_hidden_states``, which keeps every layer of both models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.losses.states import Pair, Shape, StateLossSpec
from distill.models.layouts import LAYOUTS
from distill.pruning.layout import config_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

State = tuple[str, int]
"""(part of a layer, number of the layer): "block" is its output, else a projection of its attention."""


@dataclass(frozen=True)
class Shapes:
    """What can be compared of a model's layers.

    Attributes:
        num_layers: layers of the model.
        parts: part of a layer -> heads and channels of each.
        paths: part of a layer -> its module, with ``{layer}`` for the layer's number.
    """

    num_layers: int
    parts: dict[str, Shape]
    paths: dict[str, str]

    @property
    def hidden_size(self) -> int:
        """Channels of the hidden states."""
        return self.parts["block"][1]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shapes:
        """From ``config.to_dict()`` or a parsed ``config.json``.

        Raises:
            InputError: an architecture whose layers are not known.
        """
        layout = LAYOUTS.get(str(config.get("model_type")))
        if layout is None:
            raise InputError(
                f"model_type {config.get('model_type')!r}: where its layers are is not known here, so losses on hidden "
                f"states and attention cannot read them (expected one of {', '.join(LAYOUTS)})"
            )
        sizes = layout.sizes(config)
        heads = {"queries": sizes["attention_heads"], "keys": sizes["kv_groups"], "values": sizes["kv_groups"]}
        parts = {part: (heads[part], sizes["head_dim"]) for part in layout.projections}
        paths = {"block": layout.block, **layout.projections}
        return cls(sizes["layers"], {"block": (1, sizes["hidden_channels"]), **parts}, paths)


def pairs_of(
    loss: StateLossSpec, student: Shapes, teacher: Shapes, kept: Sequence[int] | None = None
) -> tuple[Pair, ...]:
    """The pairs of layers that a loss compares; see :meth:`StateLossSpec.pairs`.

    Raises:
        InputError: these two models cannot serve the loss.
    """
    for part in loss.parts:
        if part not in student.parts or part not in teacher.parts:
            raise InputError(f"{loss.kind}: this architecture has no module of its own for {part}, so it is not served")
        loss.between(student.parts[part], teacher.parts[part])
    return loss.pairs(student.num_layers, teacher.num_layers, kept)


class States:
    """Watches parts of a model's layers while it is told to, also inside adapters and fake-quant layers.

    Args:
        model: causal language model, wrapped or not. Its hooks stay, and cost nothing between two recordings; they are
            there from the beginning, because a compiled model does not see later ones.

    Attributes:
        shapes: what can be watched.

    Raises:
        InputError: an architecture whose layers are not known.
    """

    def __init__(self, model: PreTrainedModel):
        self.shapes = Shapes.of(config_of(model))
        self._model = model
        self._seen: dict[State, Tensor] = {}
        self._watched: set[State] = set()
        self._on = False

    def watch(self, states: Iterable[State]) -> None:
        """Keep these states too from the next recording on."""
        for part, layer in set(states) - self._watched:
            module = self._model.get_submodule(self.shapes.paths[part].format(layer=layer))
            module.register_forward_hook(partial(self._keep, (part, layer)))
            self._watched.add((part, layer))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what passes within the block; what gradient checkpointing computes again later does not count."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def take(self) -> dict[State, Tensor]:
        """The states of the last recording, [batch, sequence, width] each; they are given once, and then let go.

        Raises:
            InputError: a module was passed by.
        """
        seen, self._seen = self._seen, {}
        for part, layer in sorted(self._watched - seen.keys()):
            raise InputError(
                f"the {part} of layer {layer} was not seen; a compiled model hides it under gradient checkpointing: "
                "leave out one of the two, or the loss that reads it"
            )
        return seen

    def _keep(self, state: State, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._on:
            self._seen[state] = output[0] if isinstance(output, tuple) else output
