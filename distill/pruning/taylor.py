"""Taylor: the score of a unit is the first-order change of the loss if the unit is removed. Needs gradients.

    unit_j = sum_samples |sum_tokens sum_sites a_j * dL/da_j| / tokens

with L the sample's cross-entropy, summed over the unmasked tokens. The inner sum is the derivative of L with respect to
a gate with value 1 that multiplies the output of unit j. Its negative is the first-order change of L if the gate is set
to 0.

    mlp_neurons       a = input of the down projection
    attention_heads   a = input of the attention's output projection; one gate for all channels of the head
    kv_groups         one gate for all channels of all query heads of the group
    hidden_channels   a = inputs of attention and MLP in every layer
    layers            a = output minus input of the layer

Experts and their neurons are not scored.

For MLP neurons of a small model no criterion is better right after the cut. With few samples the scores are noisy:
with 16 of them it is far worse than activation on SmolLM2-135M (``benchmarks/real_models.py``). It needs a backward
pass without weight gradients, so it costs about three forward passes. A first-order estimate is poor for a whole layer;
use ``leave_one_out`` for depth.

Source: Molchanov et al. 2017, arXiv 1611.06440, for channels; Michel, Levy, Neubig 2019, arXiv 1905.10650, for gates on
heads, with the absolute value taken sample by sample as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.layout import WIDTH_AXES, Layout, config_of
from distill.pruning.next_token_loss import predictions, require_targets, target_loss
from distill.pruning.observe import eval_mode, masked_batches, no_cache

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.observe import Batches


class Taylor(CriterionSpec):
    """First-order change of the loss without a unit; scores width and depth, with gradients."""

    axes: ClassVar[tuple[str, ...]] = (*WIDTH_AXES, "layers")

    kind: Literal["taylor"] = "taylor"

    def measure(self, model: nn.Module, layout: Layout, batches: Batches, statistics: Statistics) -> None:
        """A forward and a backward pass over each batch."""
        with _gated(model, layout) as gates:
            for inputs, targets, mask in masked_batches(model, batches, layout, predicted=True):
                require_targets(layout, inputs, self.kind)
                gates.clear()
                causal: Any = model
                logits = predictions(causal(**inputs, **no_cache(layout)).logits, mask)  # [tokens, vocabulary]
                target_loss(logits, targets[mask]).backward()
                del logits  # frees the graph, and the tensors that its hooks hold, before the next forward pass
                for name, derivative in gates.items():
                    statistics.add(name, derivative.double().abs().sum(0))
                statistics.add("tokens", mask.sum())

    def compute_scores(self, model: nn.Module, layout: Layout, statistics: Statistics) -> Scores:
        """See :meth:`CriterionSpec.compute_scores`."""
        import torch

        layers = range(layout.sizes(config_of(model))["layers"])
        rows = {
            axis: torch.stack([statistics[f"{axis} {layer}"] for layer in layers]).squeeze(-1) / statistics["tokens"]
            for axis in ("mlp_neurons", "attention_heads", "kv_groups", "layers")
            if f"{axis} 0" in statistics.sums
        }
        rows["hidden_channels"] = statistics["hidden_channels"] / statistics["tokens"]
        return Scores(**{axis: values.float() for axis, values in rows.items()})


def taylor(values: Tensor, gradient: Tensor) -> Tensor:
    """Derivative of the loss with respect to a gate on each channel.

    Args:
        values: activations [batch, sequence, channels].
        gradient: of the loss with respect to them, [batch, sequence, channels].

    Returns:
        fp32 [batch, channels].
    """
    import torch

    derivative: Tensor = torch.linalg.vecdot(values.float(), gradient.float(), dim=1)  # [batch, channels]
    if derivative.isfinite().all():
        return derivative
    # masked positions may hold NaN or infinity, but have a gradient of 0; this exact path is five times as slow
    return torch.where(gradient == 0, 0.0, values.float() * gradient.float()).sum(1)


@contextmanager
def _gated(model: nn.Module, layout: Layout) -> Iterator[dict[str, Tensor]]:
    """Inside the context, a backward pass fills the returned dict: gate -> derivative of the loss, [batch, units].

    The weights are frozen inside the context, so only activations get a gradient.
    """
    import torch

    sizes = layout.sizes(config_of(model))
    gates: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        gates[name] = gates[name] + value if name in gates else value

    def follow(seen: Tensor, names: dict[str, int]) -> None:
        """Register a hook on the gradient of ``seen`` that adds to each gate; ``names`` maps a gate to its units."""
        values = seen.detach()  # without it, the hook and the graph would keep each other alive after the batch

        def hook(gradient: Tensor) -> None:
            derivative = taylor(values, gradient)
            for name, units in names.items():
                add(name, derivative.unflatten(1, (units, -1)).sum(-1))

        seen.register_hook(hook)

    def entering(names: dict[str, int]) -> Callable[..., None]:
        return lambda _module, args, kwargs: follow(args[0] if args else kwargs["hidden_states"], names)

    def adding(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            out = output[0] if isinstance(output, tuple) else output
            added = out.detach() - entered.detach()  # [batch, sequence, hidden]
            out.register_hook(lambda gradient: add(name, taylor(added, gradient).sum(1, keepdim=True)))

        return hook

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings: Any = model
    handles = [
        embeddings.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_(True))
    ]
    for layer in range(sizes["layers"]):
        sites = {
            **({layout.mlp_down: {f"mlp_neurons {layer}": sizes["mlp_neurons"]}} if layout.mlp_down else {}),
            layout.attention_out: {f"{axis} {layer}": sizes[axis] for axis in ("attention_heads", "kv_groups")},
            **{path: {"hidden_channels": sizes["hidden_channels"]} for path in layout.reads},
        }
        for path, names in sites.items():
            module = model.get_submodule(path.format(layer=layer))
            handles.append(module.register_forward_pre_hook(entering(names), with_kwargs=True))
        block = model.get_submodule(layout.block.format(layer=layer))
        handles.append(block.register_forward_hook(adding(f"layers {layer}"), with_kwargs=True))
    try:
        model.requires_grad_(False)
        with torch.enable_grad(), eval_mode(model):
            yield gates
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
