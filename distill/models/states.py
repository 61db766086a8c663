"""What the layers of a model put out on the way, for losses that compare more than its predictions.

By hooks on the wanted modules alone, not by ``output_hidden_states``, which keeps every layer of both models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.losses.states import Shape
from distill.models.layouts import LAYOUTS
from distill.pruning.layout import config_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

State = tuple[str, int]
"""(part of a layer, number of the layer): "block" is its output, else a projection of its attention."""


class States:
    """Watches parts of a model's layers while it is told to, also inside adapters and fake-quant layers.

    Args:
        model: causal language model, wrapped or not. Its hooks stay, and cost nothing between two recordings; they are
            there from the beginning, because a compiled model does not see later ones.

    Attributes:
        num_layers: layers of the model.
        shapes: heads and channels of every part that can be watched.

    Raises:
        InputError: an architecture whose layers are not known.
    """

    def __init__(self, model: PreTrainedModel):
        config = config_of(model)
        layout = LAYOUTS.get(config["model_type"])
        if layout is None:
            raise InputError(
                f"model_type {config['model_type']!r}: where its layers are is not known here, so losses on hidden "
                f"states and attention cannot read them (expected one of {', '.join(LAYOUTS)})"
            )
        sizes = layout.sizes(config)
        heads = {"queries": sizes["attention_heads"], "keys": sizes["kv_groups"], "values": sizes["kv_groups"]}
        self.num_layers = sizes["layers"]
        self.shapes: dict[str, Shape] = {"block": (1, sizes["hidden_channels"])}
        self.shapes |= {part: (heads[part], sizes["head_dim"]) for part in layout.projections}
        self._model, self._paths = model, {"block": layout.block, **layout.projections}
        self._seen: dict[State, Tensor] = {}
        self._watched: set[State] = set()
        self._on = False

    def watch(self, states: Iterable[State]) -> None:
        """Keep these states too from the next recording on."""
        for part, layer in set(states) - self._watched:
            module = self._model.get_submodule(self._paths[part].format(layer=layer))
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
