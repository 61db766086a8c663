"""Observe the inputs and outputs of modules while a model reads the calibration data, in one pass for all criteria."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distill.core.batch import known_inputs, model_inputs
from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.pruning.layout import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Batches = Iterable[Mapping[str, Tensor]]
    Observer = Callable[["ModuleIO"], None]
    ExpertObserver = Callable[["ExpertTokens"], None]


class ModuleIO:
    """The input and output of one module in one forward pass, shared by all observers of the module.

    Attributes:
        mask: bool [batch, sequence], True for tokens that count; cut after the last position that counts in any sample.
    """

    def __init__(self, input: Tensor, output: Tensor, tokens: TokenMask):
        self._input, self._output, self._tokens, self.mask = input, output, tokens, tokens.mask

    @cached_property
    def input(self) -> Tensor:
        """The module's input [batch, sequence, channels], zero where the mask is False."""
        return self._tokens.apply(self._input)

    @cached_property
    def output(self) -> Tensor:
        """The module's output [batch, sequence, channels], zero where the mask is False."""
        return self._tokens.apply(self._output)


@dataclass(frozen=True)
class ExpertTokens:
    """One expert in one forward pass: the unmasked tokens that the router sent to it.

    Attributes:
        expert: index of the expert.
        neurons: [tokens, intermediate], the input of its down projection.
        output: [tokens, hidden], before the multiplication by the router weight.
        weights: [tokens], the router weights.
        samples: int64 [tokens], index of each token's sample in the batch.
        tokens_of_samples: int64 [batch], number of unmasked tokens per sample, routed to any expert.
    """

    expert: int
    neurons: Tensor
    output: Tensor
    weights: Tensor
    samples: Tensor
    tokens_of_samples: Tensor


class TokenMask:
    """The mask of a batch, on the model's device.

    Attributes:
        full: bool [batch, sequence].
        mask: the same, cut after the last column with a True.
    """

    def __init__(self, mask: Tensor, device: torch.device):
        self.full = mask.to(device)
        columns = mask.any(0).nonzero()
        self._end = int(columns[-1]) + 1 if len(columns) else 0
        mask = mask[:, : self._end]
        self._all, self.mask = bool(mask.all()), mask.to(device)

    def apply(self, values: Tensor) -> Tensor:
        """Cut ``values`` [batch, sequence, channels] like ``mask``, and set them to zero where it is False."""
        values = values[:, : self._end]
        # In packed text only the last column is masked, and a slice costs nothing. masked_fill, not a product:
        # masked positions may hold NaN.
        return values if self._all else values.masked_fill(~self.mask.unsqueeze(-1), 0)


def observe(model: nn.Module, layout: Layout, batches: Batches, observers: Iterable[tuple[str, Any]]) -> None:
    """Run all batches through the model's body once, and call each observer with the input and output of its module.

    The output head is not run: no observer needs logits, and they are the largest tensor of a forward pass.

    Args:
        model: see :meth:`~distill.pruning.base.CriterionSpec.score`.
        layout: the layout of its architecture.
        batches: see :meth:`~distill.pruning.base.CriterionSpec.score`.
        observers: (module path, function); several may have the same path. The function is called with a
            :class:`ModuleIO`, or, for the path ``layout.experts``, with one :class:`ExpertTokens` per expert.

    Raises:
        InputError: the masks select no token, or have the wrong shape.
    """
    import torch

    by_path: dict[str, list[Any]] = {}
    for path, observer in observers:
        by_path.setdefault(path, []).append(observer)
    tokens: TokenMask

    def hook_for(called: list[Observer]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            module_io = ModuleIO(entered, output[0] if isinstance(output, tuple) else output, tokens)
            for observer in called:
                observer(module_io)

        return hook

    body, handles, replaced = model.get_submodule(layout.body), [], []
    try:
        for path, called in by_path.items():
            module = model.get_submodule(path)
            if layout.experts is not None and path.endswith(layout.experts.rpartition("{layer}")[2]):
                module.forward = _observed_experts(module, called, lambda: tokens)
                replaced.append(module)
            else:
                handles.append(module.register_forward_hook(hook_for(called), with_kwargs=True))
        with torch.no_grad(), eval_mode(model):
            for inputs, _, mask in masked_batches(model, batches, layout):
                tokens = TokenMask(mask, next(model.parameters()).device)
                body(**inputs, **no_cache(layout))
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.forward


def _observed_experts(
    experts: Any, observers: list[ExpertObserver], tokens_of_batch: Callable[[], TokenMask]
) -> Callable[..., Tensor]:
    """A forward for a module of experts that returns what its own forward does, and calls the observers per expert.

    The module's own forward computes all experts in one kernel, where no hook can see a single expert.
    """
    import torch
    import torch.nn.functional as F

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # hidden_states: [tokens, hidden]; top_k_index, top_k_weights: [tokens, k]
        total, mask = torch.zeros_like(hidden_states), tokens_of_batch().full
        for expert in range(len(experts.down_proj)):
            rows, slots = torch.where(top_k_index == expert)  # [routed] each: the token, and which of its k choices
            gate, up = F.linear(hidden_states[rows], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            neurons = experts.act_fn(gate) * up  # [routed, intermediate]
            output = F.linear(neurons, experts.down_proj[expert])  # [routed, hidden]
            weights = top_k_weights[rows, slots]  # [routed]
            total.index_add_(0, rows, (output * weights.unsqueeze(-1)).to(total.dtype))
            seen = mask.flatten()[rows]  # bool [routed]
            samples = rows[seen] // mask.shape[1]  # tokens are numbered sample by sample
            routed = ExpertTokens(expert, neurons[seen], output[seen], weights[seen], samples, mask.sum(1))
            for observer in observers:
                observer(routed)
        return total

    return forward


def masked_batches(
    model: nn.Module, batches: Batches, layout: Layout, *, predicted: bool = False
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """(model inputs on the model's device, targets on the same device, mask on the CPU) of each batch.

    Args:
        model: that reads them.
        batches: see :func:`distill.pruning.base.score`. For an encoder all tokens of their ``attention_mask`` count as
            activations, whatever is predicted from them.
        layout: the layout of the model's architecture.
        predicted: whether the mask is that of the predictions, which is [batch, 1] where one is made per text.

    Raises:
        InputError: a mask has the wrong shape or type, or, after the last batch, no token was selected.
    """
    import torch

    device, tokens = next(model.parameters()).device, 0
    for batch in stoppable(batches):
        mask, attended = batch["mask"].cpu(), batch.get("attention_mask")
        shape = batch["input_ids"].shape
        if attended is not None and not predicted and layout.task != "causal_lm":
            mask = attended.cpu().bool()
        if (mask.shape != shape and not predicted) or mask.dtype != torch.bool:
            raise InputError(
                f"a calibration batch has a mask of {mask.dtype} {tuple(mask.shape)}, "
                f"expected torch.bool {tuple(batch['input_ids'].shape)}, the shape of its input_ids"
            )
        yield known_inputs(model, model_inputs(batch, device)), batch["targets"].to(device), mask
        tokens += int(mask.sum())
    if tokens == 0:
        raise InputError("the masks of the calibration data select 0 tokens, expected 1 or more; use more data")


def no_cache(layout: Layout) -> dict[str, bool]:
    """Arguments that keep a decoder from storing keys and values; encoders store none."""
    return {"use_cache": False} if layout.task == "causal_lm" else {}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the context, and restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
