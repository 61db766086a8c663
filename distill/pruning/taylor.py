"""Taylor: a unit matters as much as the loss would change without it, to first order. Needs gradients.

    unit_j = sum_samples |sum_tokens sum_sites a_j * dL/da_j| / tokens

with L the sample's cross-entropy, summed over the tokens that count; the inner sum is the derivative of L to a gate of
value 1 on all that unit j hands on, so minus what first order says L gains if the gate is shut.

    mlp_neurons       a = input of the down projection
    attention_heads   a = input of the attention's output projection; the gate is on all channels of the head
    kv_groups         the gate is on all channels of all query heads of the group
    hidden_channels   a = what attention and MLP of every layer read of the residual stream
    layers            a = what the layer adds to the residual stream

Experts and their neurons are not scored.

Right after the cut as good as any for MLP neurons; it costs a backward pass (no weight gradients), so about three
forward passes. First order says little about a whole layer; ``leave_one_out`` measures instead.

Source: Molchanov et al. 2017, arXiv 1611.06440, for channels; Michel, Levy, Neubig 2019, arXiv 1905.10650, for gates on
heads, with the absolute value taken sample by sample as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.layout import WIDTH_AXES, Layout, config_of
from distill.pruning.likelihood import cross_entropy, require_causal
from distill.pruning.tally import Tally
from distill.pruning.watch import evaluating, prepared

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.watch import Batches


class Taylor(CriterionSpec):
    """First-order change of the loss without a unit; scores width and depth, with gradients."""

    axes: ClassVar[tuple[str, ...]] = (*WIDTH_AXES, "layers")

    kind: Literal["taylor"] = "taylor"

    def measure(self, model: nn.Module, layout: Layout, batches: Batches, tally: Tally) -> None:
        """A forward and a backward pass over each batch."""
        require_causal(layout, self.kind)
        with _gated(model, layout) as gates:
            for inputs, mask in prepared(model, batches):
                gates.clear()
                causal: Any = model
                logits = causal(**inputs, use_cache=False).logits[mask]
                cross_entropy(logits, inputs["input_ids"].roll(-1, dims=1)[mask]).backward()
                del logits  # with the graph, and what the hooks in it hold, before the next one is made
                for name, derivative in gates.items():
                    tally.add(name, derivative.double().abs().sum(0))
                tally.add("tokens", mask.sum())

    def judge(self, model: nn.Module, layout: Layout, tally: Tally) -> Scores:
        """See :meth:`CriterionSpec.judge`."""
        import torch

        layers = range(layout.sizes(config_of(model))["layers"])
        rows = {
            axis: torch.stack([tally[f"{axis} {layer}"] for layer in layers]).squeeze(-1) / tally["tokens"]
            for axis in ("mlp_neurons", "attention_heads", "kv_groups", "layers")
            if f"{axis} 0" in tally.sums
        }
        rows["hidden_channels"] = tally["hidden_channels"] / tally["tokens"]
        return Scores(**{axis: values.float() for axis, values in rows.items()})


def taylor(values: Tensor, gradient: Tensor) -> Tensor:
    """Derivative to a gate on each channel, fp32 [batch, channels]; values and gradient [batch, sequence, channels]."""
    import torch

    derivative: Tensor = torch.linalg.vecdot(values.float(), gradient.float(), dim=1)
    if derivative.isfinite().all():
        return derivative
    # What gets no gradient adds nothing, whatever stands there; to look for it always would cost five times as much.
    return torch.where(gradient == 0, 0.0, values.float() * gradient.float()).sum(1)


@contextmanager
def _gated(model: nn.Module, layout: Layout) -> Iterator[dict[str, Tensor]]:
    """A dict that a backward pass fills: gate -> derivative of the loss to it, [batch, units].

    The weights are frozen meanwhile: only activations get a gradient.
    """
    import torch

    sizes = layout.sizes(config_of(model))
    gates: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        gates[name] = gates[name] + value if name in gates else value

    def follow(seen: Tensor, names: dict[str, int]) -> None:
        """When the gradient of ``seen`` comes by, add to each gate; a name stands with the number of its units."""
        values = seen.detach()  # the hook must not hold what holds it: a batch's graph would stay until it is collected

        def hook(gradient: Tensor) -> None:
            derivative = taylor(values, gradient)
            for name, units in names.items():
                add(name, derivative.unflatten(1, (units, -1)).sum(-1))

        seen.register_hook(hook)

    def entering(names: dict[str, int]) -> Callable[..., None]:
        return lambda _module, args, kwargs: follow(args[0] if args else kwargs["hidden_states"], names)

    def adding(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Any) -> None:
            given, out = (
                args[0] if args else kwargs["hidden_states"],
                output[0] if isinstance(output, tuple) else output,
            )
            added = out.detach() - given.detach()
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
        with torch.enable_grad(), evaluating(model):
            yield gates
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
