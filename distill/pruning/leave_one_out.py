"""Leave one out: the score of a layer is the measured increase of the loss without it. Scores depth.

    layer_l = mean_tokens(CE without layer l) - mean_tokens(CE)             loss: cross_entropy
    layer_l = mean_tokens KL(p || p without layer l)                        loss: kl

in nats per token; exp of the first is the factor by which perplexity grows. With ``block_layers`` n above 1, layers s
to s + n - 1 are removed together, for every s: the exact cost of each contiguous cut.

    layers            one score per layer, if block_layers is 1
    layer_blocks      one score per block, if it is larger; ``keep.layer_choice: contiguous`` then chooses a block

Prefer it where its cost is acceptable: block influence measures how a layer changes the residual stream and not the
effect on the output, and the scores of single layers do not add up to the cost of a block. KL needs no labels and is
less noisy. Layers before the removed ones are not computed again, so L layers cost about L / 2 forward passes.

Source: Muralidharan et al. 2024, arXiv 2407.14679, section 3.1 (perplexity); Sreenivas et al. 2024, arXiv 2408.11796
(contiguous blocks); Kim et al. 2024, arXiv 2402.02834 (perplexity, layer by layer).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.numerics.term import LossTerm
from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.keep import KeepSpec
from distill.pruning.layout import Layout, config_of
from distill.pruning.next_token_loss import kl_sum, predictions, require_targets, target_loss
from distill.pruning.observe import eval_mode, masked_batches, no_cache

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn

    from distill.pruning.observe import Batches


class LeaveOneOut(CriterionSpec):
    """Increase of the loss when a layer, or a block of layers, is removed; scores depth."""

    axes: ClassVar[tuple[str, ...]] = ("layers",)

    kind: Literal["leave_one_out"] = "leave_one_out"
    loss: Literal["cross_entropy", "kl"] = "cross_entropy"
    """The loss: cross-entropy on the text (of a regression the squared error), or KL divergence from the original
    model."""
    block_layers: int | None = Field(None, ge=1)
    """Layers removed together; null: as many as the plan removes if layer_choice is contiguous, else 1."""

    def resolved_for(self, keep: KeepSpec, num_layers: int) -> Self:
        """See :meth:`CriterionSpec.resolved_for`."""
        contiguous = keep.layer_choice == "contiguous" and keep.num_hidden_layers is not None
        wanted = max(1, num_layers - keep.num_layers_of(num_layers)) if contiguous else 1
        if self.block_layers not in (None, wanted):
            raise InputError(
                f"depth_criterion.block_layers ({self.block_layers}) must equal the number of neighbouring layers that "
                f"the plan removes ({wanted}); remove the key"
            )
        return self.model_copy(update={"block_layers": wanted})

    def measure(self, model: nn.Module, layout: Layout, batches: Batches, statistics: Statistics) -> None:
        """One full pass over each batch, and one pass per block that starts at the end of the removed block."""
        import torch

        blocks = [
            model.get_submodule(layout.block.format(layer=layer))
            for layer in range(layout.sizes(config_of(model))["layers"])
        ]
        length = self._length(len(blocks))
        with torch.no_grad(), eval_mode(model):
            for inputs, following, mask in masked_batches(model, batches, layout, predicted=True):
                if self.loss == "cross_entropy" or layout.task == "embedding":
                    require_targets(layout, inputs, self.kind)
                targets = following[mask]  # [tokens]
                if self.loss == "kl" and targets.is_floating_point():
                    raise InputError(
                        f"{self.kind}: loss: kl compares distributions, and a regression predicts a number; use loss: "
                        "cross_entropy, which is the squared error there"
                    )
                passes = leave_one_out(model, blocks, length, inputs, **no_cache(layout))
                original = predictions(next(passes), mask)  # [tokens, vocabulary]
                before = target_loss(original, targets)
                for start, without in enumerate(stoppable(passes)):
                    logits = predictions(without, mask)  # [tokens, vocabulary]
                    increase = kl_sum(original, logits) if self.loss == "kl" else target_loss(logits, targets) - before
                    statistics.add(f"without {start}", increase)
                statistics.add("tokens", mask.sum())

    def compute_scores(self, model: nn.Module, layout: Layout, statistics: Statistics) -> Scores:
        """See :meth:`CriterionSpec.compute_scores`."""
        import torch

        num_layers = layout.sizes(config_of(model))["layers"]
        length = self._length(num_layers)
        rises = [
            LossTerm(statistics[f"without {start}"], statistics["tokens"]) for start in range(num_layers - length + 1)
        ]
        values = torch.stack([rise.per_token() for rise in rises]).float()
        return Scores(layers=values) if length == 1 else Scores(layer_blocks=values)

    def _length(self, num_layers: int) -> int:
        length = self.block_layers or 1
        if length >= num_layers:
            raise InputError(f"block_layers ({length}) must be less than the number of layers ({num_layers})")
        return length


def leave_one_out(
    model: nn.Module, blocks: list[nn.Module], length: int, inputs: Mapping[str, Tensor], **settings: bool
) -> Iterator[Tensor]:
    """Yield the logits of the model, then those without layers s to s + length - 1 for each s.

    Args:
        model: a transformers model.
        blocks: its layers.
        length: number of layers removed together.
        inputs: keyword arguments of the model.
        settings: further ones, such as ``use_cache``.

    Yields:
        [batch, sequence, vocabulary], or [batch, classes] of a classifier of texts.
    """
    causal: Any = model
    with _record_inputs(blocks) as entered:
        logits = causal(**inputs, **settings).logits
    yield logits
    for start in range(len(blocks) - length + 1):
        with _bypassed(blocks[: start + length], entered[start]):
            logits = causal(**inputs, **settings).logits
        yield logits


@contextmanager
def _record_inputs(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside the context, record the input of each block, [batch, sequence, hidden] each."""
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
def _bypassed(blocks: list[nn.Module], stream: Tensor) -> Iterator[None]:
    """Inside the context, the forward of each of these blocks returns ``stream`` without computing anything.

    The model's own forward still runs, so masks, positions, the final norm and the head are computed as usual.
    """
    try:
        for block in blocks:
            block.forward = lambda *args, **kwargs: stream
        yield
    finally:
        for block in blocks:
            del block.forward
