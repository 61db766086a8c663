"""Leave one out: a layer matters as much as the model gets worse without it. Measures depth instead of guessing it.

    layer_l = mean_tokens(CE without layer l) - mean_tokens(CE)             loss: cross_entropy
    layer_l = mean_tokens KL(p || p without layer l)                        loss: kl

in nats a token; exp of the first is the factor by which perplexity grows. With ``block_layers`` n above 1 not one layer
is left out but layers s to s + n - 1, for every s in turn: what a contiguous cut costs, measured as a whole.

    layers            each layer, when block_layers is 1
    layer_blocks      each block, when it is more; ``keep.layer_choice: contiguous`` then chooses among them

For when it can be paid for: block influence sees how far a layer turns the stream, not what that does to the output,
and a sum of single scores is not what a whole block costs. KL needs no labels and is less noisy. What stands before the
left-out layers is not computed again, so that all layers together cost about half as many passes as there are layers.

Source: Muralidharan et al. 2024, arXiv 2407.14679, section 3.1 (perplexity); Sreenivas et al. 2024, arXiv 2408.11796
(contiguous blocks); Kim et al. 2024, arXiv 2402.02834 (perplexity, layer by layer).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill.core.errors import InputError
from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.keep import KeepSpec
from distill.pruning.layout import Layout, config_of
from distill.pruning.likelihood import cross_entropy, divergence, require_causal
from distill.pruning.tally import Tally
from distill.pruning.watch import evaluating, prepared

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn

    from distill.pruning.watch import Batches


class LeaveOneOut(CriterionSpec):
    """How much worse the model gets when a layer, or a block of layers, is left out; scores depth."""

    axes: ClassVar[tuple[str, ...]] = ("layers",)

    kind: Literal["leave_one_out"] = "leave_one_out"
    loss: Literal["cross_entropy", "kl"] = "cross_entropy"
    """What worse means: the cross-entropy of the text, or the divergence from the whole model."""
    block_layers: int | None = Field(None, ge=1)
    """Layers left out together; null: as many as the plan drops where layer_choice is contiguous, else 1."""

    def fitted_to(self, keep: KeepSpec, num_layers: int) -> Self:
        """See :meth:`CriterionSpec.fitted_to`."""
        contiguous = keep.layer_choice == "contiguous" and keep.num_hidden_layers is not None
        wanted = max(1, num_layers - (keep.num_hidden_layers or num_layers)) if contiguous else 1
        if self.block_layers not in (None, wanted):
            raise InputError(
                f"depth_criterion.block_layers ({self.block_layers}) must be the number of layers that the plan drops "
                f"together, {wanted}; leave it out"
            )
        return self.model_copy(update={"block_layers": wanted})

    def measure(self, model: nn.Module, layout: Layout, batches: Batches, tally: Tally) -> None:
        """A pass over each batch with all layers, and one a block from where the block begins."""
        import torch

        if self.loss == "cross_entropy":
            require_causal(layout, self.kind)
        blocks = [
            model.get_submodule(layout.block.format(layer=layer))
            for layer in range(layout.sizes(config_of(model))["layers"])
        ]
        length = self._length(len(blocks))
        with torch.no_grad(), evaluating(model):
            for inputs, mask in prepared(model, batches):
                targets = inputs["input_ids"].roll(-1, dims=1)[mask]
                every = leave_one_out(model, blocks, length, inputs)
                whole = next(every)[mask]
                before = cross_entropy(whole, targets)
                for start, without in enumerate(every):
                    logits = without[mask]
                    rise = divergence(whole, logits) if self.loss == "kl" else cross_entropy(logits, targets) - before
                    tally.add(f"without {start}", rise)
                tally.add("tokens", mask.sum())

    def judge(self, model: nn.Module, layout: Layout, tally: Tally) -> Scores:
        """See :meth:`CriterionSpec.judge`."""
        import torch

        num_layers = layout.sizes(config_of(model))["layers"]
        length = self._length(num_layers)
        rises = [tally[f"without {start}"] / tally["tokens"] for start in range(num_layers - length + 1)]
        values = torch.stack(rises).float()
        return Scores(layers=values) if length == 1 else Scores(layer_blocks=values)

    def _length(self, num_layers: int) -> int:
        length = self.block_layers or 1
        if length >= num_layers:
            raise InputError(f"block_layers ({length}) must be less than the model's {num_layers} layers")
        return length


def leave_one_out(
    model: nn.Module, blocks: list[nn.Module], length: int, inputs: Mapping[str, Tensor]
) -> Iterator[Tensor]:
    """Logits of the whole model, then of the model without layers s to s + length - 1 for each s.

    Args:
        model: a transformers model.
        blocks: its layers.
        length: layers left out together.
        inputs: of the model.

    Yields:
        [batch, sequence, vocabulary].
    """
    causal: Any = model
    with _recording(blocks) as entered:
        logits = causal(**inputs, use_cache=False).logits
    yield logits
    for start in range(len(blocks) - length + 1):
        with _leading_to(blocks[: start + length], entered[start]):
            logits = causal(**inputs, use_cache=False).logits
        yield logits


@contextmanager
def _recording(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The hidden states that enter each block while it lasts, [batch, sequence, hidden] each."""
    entered: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _leading_to(blocks: list[nn.Module], stream: Tensor) -> Iterator[None]:
    """While it lasts, these blocks compute nothing: whatever enters the first, ``stream`` leaves the last.

    The model's own forward runs on, so that masks, positions, final norm and head are as it makes them.
    """
    try:
        for block in blocks:
            block.forward = lambda *args, **kwargs: stream
        yield
    finally:
        for block in blocks:
            del block.forward
