"""How a model is watched while it reads the calibration data: one pass for everyone who wants to see something."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distill.core.batch import model_inputs
from distill.core.errors import InputError
from distill.pruning.layout import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Batches = Iterable[Mapping[str, Tensor]]
    Watcher = Callable[["Passage"], None]
    ExpertWatcher = Callable[["Routed"], None]


class Passage:
    """What passes one module in one forward pass; all who watch the module share it.

    Attributes:
        mask: bool [batch, sequence], True where a token counts; without the positions that count in no sample.
    """

    def __init__(self, given: Tensor, output: Tensor, counted: Counted):
        self._given, self._output, self._counted, self.mask = given, output, counted, counted.mask

    @cached_property
    def given(self) -> Tensor:
        """What enters the module, [batch, sequence, channels], with zeros where no token counts."""
        return self._counted.of(self._given)

    @cached_property
    def output(self) -> Tensor:
        """What leaves the module, as ``given``."""
        return self._counted.of(self._output)


@dataclass(frozen=True)
class Routed:
    """What one expert of a mixture does in one forward pass, for the tokens that count and were sent to it.

    Attributes:
        expert: its index.
        neurons: [tokens, intermediate], the input of its down projection.
        output: [tokens, hidden], before the router's weight.
        weights: [tokens], the router's.
        samples: int64 [tokens], the sample that each token is of.
        tokens_of_samples: int64 [batch], how many tokens of each sample count, whoever they were sent to.
    """

    expert: int
    neurons: Tensor
    output: Tensor
    weights: Tensor
    samples: Tensor
    tokens_of_samples: Tensor


class Counted:
    """Which tokens of a batch count, and how to see no others.

    Attributes:
        whole: bool [batch, sequence], on the model's device.
        mask: the same without the columns after the last that counts.
    """

    def __init__(self, mask: Tensor, device: torch.device):
        self.whole = mask.to(device)
        columns = mask.any(0).nonzero()
        self._end = int(columns[-1]) + 1 if len(columns) else 0
        mask = mask[:, : self._end]
        self._all, self.mask = bool(mask.all()), mask.to(device)

    def of(self, values: Tensor) -> Tensor:
        """[batch, sequence, channels] up to the last column that counts, with zeros for tokens that do not."""
        values = values[:, : self._end]
        # Packed text counts but for its last column, and a slice costs nothing. Outside the mask anything may stand,
        # even what is not a number.
        return values if self._all else values.masked_fill(~self.mask.unsqueeze(-1), 0)


def watch(model: nn.Module, layout: Layout, batches: Batches, watchers: Iterable[tuple[str, Any]]) -> None:
    """Run all batches through the model's body once and show each watcher what passes its module.

    The output head is not run: no watcher needs logits, and they are the largest tensor of a pass.

    Args:
        model: see :meth:`~distill.pruning.base.CriterionSpec.score`.
        layout: the layout of its architecture.
        batches: see :meth:`~distill.pruning.base.CriterionSpec.score`.
        watchers: (module path, function of what passes it); a path may stand there several times. Who watches the
            experts of a mixture (``layout.experts``) is shown each of them, as :class:`Routed`.

    Raises:
        InputError: no token counts, or a mask of the wrong shape.
    """
    import torch

    by_path: dict[str, list[Any]] = {}
    for path, watcher in watchers:
        by_path.setdefault(path, []).append(watcher)
    counted: Counted

    def hook_for(watching: list[Watcher]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            passage = Passage(given, output[0] if isinstance(output, tuple) else output, counted)
            for watcher in watching:
                watcher(passage)

        return hook

    body, handles, replaced = model.get_submodule(layout.body), [], []
    try:
        for path, watching in by_path.items():
            module = model.get_submodule(path)
            if layout.experts is not None and path.endswith(layout.experts.rpartition("{layer}")[2]):
                module.forward = _shown(module, watching, lambda: counted)
                replaced.append(module)
            else:
                handles.append(module.register_forward_hook(hook_for(watching), with_kwargs=True))
        with torch.no_grad(), evaluating(model):
            for inputs, mask in prepared(model, batches):
                counted = Counted(mask, next(model.parameters()).device)
                body(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.forward


def _shown(experts: Any, watching: list[ExpertWatcher], counted: Callable[[], Counted]) -> Callable[..., Tensor]:
    """A forward of a module of experts that computes what its own does, and shows each expert to those who watch.

    Its own computes all experts in one piece of code, where no hook can look in.
    """
    import torch
    import torch.nn.functional as F

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total, counts = torch.zeros_like(hidden_states), counted().whole
        for expert in range(len(experts.down_proj)):
            tokens, place = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            neurons = experts.act_fn(gate) * up
            output, weights = F.linear(neurons, experts.down_proj[expert]), top_k_weights[tokens, place]
            total.index_add_(0, tokens, (output * weights.unsqueeze(-1)).to(total.dtype))
            seen = counts.flatten()[tokens]
            samples = tokens[seen] // counts.shape[1]
            routed = Routed(expert, neurons[seen], output[seen], weights[seen], samples, counts.sum(1))
            for watcher in watching:
                watcher(routed)
        return total

    return forward


def prepared(model: nn.Module, batches: Batches) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """(what the model takes, on its device; the mask, on the CPU) of each batch.

    Raises:
        InputError: a mask of the wrong shape, or, at the end, no token counted.
    """
    import torch

    device, tokens = next(model.parameters()).device, 0
    for batch in batches:
        mask = batch["mask"].cpu()
        if mask.shape != batch["input_ids"].shape or mask.dtype != torch.bool:
            raise InputError(
                f"a calibration batch has a mask {mask.dtype} {tuple(mask.shape)}, "
                f"expected bool {tuple(batch['input_ids'].shape)}, the shape of its input_ids"
            )
        yield model_inputs(batch, device), mask
        tokens += int(mask.sum())
    if tokens == 0:
        raise InputError("no token of the calibration data counts (0 masked in, expected 1 or more); give it more data")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards the mode that was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
