"""The contract of a criterion: it scores units, high means keep, and edits nothing; and how a model is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from distill.core.batch import model_inputs
from distill.core.errors import InputError
from distill.core.spec import Spec
from distill.pruning.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor, nn

    Batches = Iterable[Mapping[str, Tensor]]
    Watcher = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Scores:
    """Importance of every unit of a model, fp32 on the CPU; None where nothing was scored. High means keep.

    ``Scores(**scores.tensors())`` is a round trip, so the scores may be kept as a safetensors file.

    Attributes:
        mlp_neurons: [layers, intermediate], compared within a layer; in a mixture of experts
            [layers, experts, intermediate], compared within an expert.
        attention_heads: [layers, heads], compared within a layer's KV group.
        kv_groups: [layers, kv_heads], compared within a layer.
        hidden_channels: [hidden], one order for the whole model, as the residual stream runs through it.
        experts: [layers, experts], compared within a layer.
        layers: [layers].
    """

    mlp_neurons: Tensor | None = None
    attention_heads: Tensor | None = None
    kv_groups: Tensor | None = None
    hidden_channels: Tensor | None = None
    experts: Tensor | None = None
    layers: Tensor | None = None

    def __post_init__(self) -> None:
        for axis, tensor in self.tensors().items():
            if not tensor.isfinite().all():
                raise InputError(
                    f"scores of {axis} are not finite; check the model, and load it in float32 or bfloat16"
                )

    def tensors(self) -> dict[str, Tensor]:
        """Axis -> scores, without the axes that were not scored."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {axis: tensor for axis, tensor in found.items() if tensor is not None}

    def merge(self, other: Scores) -> Scores:
        """The scores of both, as of a width and a depth criterion.

        Raises:
            InputError: both score one axis.
        """
        mine, theirs = self.tensors(), other.tensors()
        if twice := mine.keys() & theirs.keys():
            raise InputError(f"two criteria score {', '.join(sorted(twice))}; name one criterion for each axis")
        return Scores(**mine, **theirs)


class CriterionSpec(Spec):
    """What every criterion has: a kind, and the axes that it scores."""

    axes: ClassVar[tuple[str, ...]]

    kind: str

    def score(self, model: nn.Module, layout: Layout, batches: Batches) -> Scores:
        """Score the units of a model by forward passes only.

        Args:
            model: a transformers causal language model; unchanged afterwards, its train or eval mode included.
            layout: the layout of its architecture.
            batches: dicts of ``input_ids`` int64 [batch, sequence] and ``mask`` bool [batch, sequence]; optionally
                ``attention_mask`` and ``position_ids``. A list, if several criteria are to read it.

        Raises:
            InputError: no token counts, or an activation is not finite.
        """
        raise NotImplementedError


def watch(model: nn.Module, layout: Layout, batches: Batches, watchers: Mapping[str, Watcher]) -> int:
    """Run all batches through the model's body and show each watcher what passes its module.

    The output head is not run: no score needs logits, and they are the largest tensor of a pass.

    Args:
        model: see :meth:`CriterionSpec.score`.
        layout: the layout of its architecture.
        batches: see :meth:`CriterionSpec.score`.
        watchers: module path -> function of (input, output, mask); the mask is bool [batch, sequence].

    Returns:
        number of tokens that counted.

    Raises:
        InputError: no token counts, or a mask of the wrong shape.
    """
    import torch

    body, device, was_training = model.get_submodule(layout.body), next(model.parameters()).device, model.training
    mask = torch.empty(0)

    def hook_for(watcher: Watcher) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            watcher(given, output[0] if isinstance(output, tuple) else output, mask)

        return hook

    handles, tokens = [], 0
    try:
        for path, watcher in watchers.items():
            handles.append(model.get_submodule(path).register_forward_hook(hook_for(watcher), with_kwargs=True))
        model.eval()
        with torch.no_grad():
            for batch in batches:
                mask = batch["mask"].to(device)
                if mask.shape != batch["input_ids"].shape or mask.dtype != torch.bool:
                    raise InputError(
                        f"a calibration batch has a mask {mask.dtype} {tuple(mask.shape)}, "
                        f"expected bool {tuple(batch['input_ids'].shape)}, the shape of its input_ids"
                    )
                body(**model_inputs(batch, device), use_cache=False)
                tokens += int(mask.sum())
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if tokens == 0:
        raise InputError("no token of the calibration data counts (0 masked in, expected 1 or more); give it more data")
    return tokens
