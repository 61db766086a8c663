"""Whether a model keeps the documents of one row apart when their position ids start anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from distill.core.errors import InputError
from distill.models.head import hidden_states

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_FIRST, _SECOND = 5, 3


@torch.no_grad()
def check_apart(model: PreTrainedModel) -> None:
    """Hold a document that stands behind another in its row against itself alone, on a few tokens.

    transformers reads position ids that start anew as the sign of a packed row, but not in every architecture: some
    keep a state that runs on, some have no position ids, some count positions by themselves.

    Raises:
        InputError: what stands before a document changes its hidden states.
    """
    ids = torch.arange(2 * (_FIRST + _SECOND), device=model.device) % model.config.get_text_config().vocab_size
    second = ids[:_SECOND]
    rows = torch.stack([torch.cat([first, second]) for first in ids[_SECOND:].split(_FIRST)[:2]])
    places = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)]).to(model.device).expand(2, -1)
    training = model.training
    model.eval()
    try:
        alone = hidden_states(model, second.unsqueeze(0))[0].float()
        behind = hidden_states(model, rows, position_ids=places)[:, _FIRST:].float()
    except TypeError:
        raise _mixes(model, "it takes no position_ids") from None
    finally:
        model.train(training)
    eps = torch.finfo(model.dtype).eps
    # the same kernel on the same shapes: what is masked adds exact zeros
    if (seen := _differ(behind[0], behind[1])) > 0:
        raise _mixes(model, f"one changes the next by {seen:.2g} of its size")
    if (moved := _differ(behind[0], alone)) > max(16 * eps, 1e-4):
        raise _mixes(model, f"one behind another differs from itself alone by {moved:.2g} of its size")


def _differ(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().mean() / other.abs().mean()).item()


def _mixes(model: PreTrainedModel, how: str) -> InputError:
    return InputError(
        f"{type(model).__name__} does not keep the documents of one row apart ({how}); "
        "set data.packing to wrapped or padded"
    )
