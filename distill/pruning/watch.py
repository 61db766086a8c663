"""How a model is watched while it reads the calibration data: one pass for everyone who wants to see something."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from distill.core.errors import InputError
from distill.pruning.layout import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Batches = Iterable[Mapping[str, Tensor]]
    Watcher = Callable[["Passage"], None]


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


class Counted:
    """Which tokens of a batch count, and how to see no others.

    Attributes:
        mask: bool [batch, sequence], without the columns after the last that counts; on the model's device.
    """

    def __init__(self, mask: Tensor, device: torch.device):
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


def watch(model: nn.Module, layout: Layout, batches: Batches, watchers: Iterable[tuple[str, Watcher]]) -> None:
    """Run all batches through the model's body once and show each watcher what passes its module.

    The output head is not run: no watcher needs logits, and they are the largest tensor of a pass.

    Args:
        model: see :meth:`~distill.pruning.base.CriterionSpec.score`.
        layout: the layout of its architecture.
        batches: see :meth:`~distill.pruning.base.CriterionSpec.score`.
        watchers: (module path, function of what passes it); a path may stand there several times.

    Raises:
        InputError: no token counts, or a mask of the wrong shape.
    """
    import torch

    by_path: dict[str, list[Watcher]] = {}
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

    body, handles = model.get_submodule(layout.body), []
    try:
        for path, watching in by_path.items():
            handles.append(model.get_submodule(path).register_forward_hook(hook_for(watching), with_kwargs=True))
        with torch.no_grad(), evaluating(model):
            for inputs, mask in prepared(model, batches):
                counted = Counted(mask, next(model.parameters()).device)
                body(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


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
        yield {k: batch[k].to(device) for k in ("input_ids", "attention_mask", "position_ids") if k in batch}, mask
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
