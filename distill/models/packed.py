"""Check that documents packed into one row do not attend to each other, given position ids that restart at 0."""

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
    """Compare a document's hidden states after another document in the same row with those in a row of its own.

    transformers recognises packed rows by position ids that restart at 0, but not for every architecture: some have a
    recurrent state, some take no position ids, some compute positions themselves.

    Raises:
        InputError: the tokens before a document change its hidden states.
    """
    ids = torch.arange(2 * (_FIRST + _SECOND), device=model.device) % model.config.get_text_config().vocab_size
    second = ids[:_SECOND]
    # two rows with different first documents and the same second document, [2, _FIRST + _SECOND]
    rows = torch.stack([torch.cat([first, second]) for first in ids[_SECOND:].split(_FIRST)[:2]])
    places = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)]).to(model.device).expand(2, -1)
    training = model.training
    model.eval()
    try:
        single = hidden_states(model, second.unsqueeze(0))[0].float()  # [_SECOND, hidden]
        behind = hidden_states(model, rows, position_ids=places)[:, _FIRST:].float()
    except TypeError:
        raise _mixes(model, "it takes no position_ids") from None
    finally:
        model.train(training)
    eps = torch.finfo(model.dtype).eps
    # bitwise equal if the first document is masked: the kernel and the shapes are the same, and masked terms are exact
    # 0
    if (seen := _differ(behind[0], behind[1])) > 0:
        raise _mixes(model, f"the first document changes the second by {seen:.2g} of its size")
    if (moved := _differ(behind[0], single)) > max(16 * eps, 1e-4):
        raise _mixes(
            model, f"a second document differs from the same document in its own row by {moved:.2g} of its size"
        )


def _differ(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().mean() / other.abs().mean()).item()


def _mixes(model: PreTrainedModel, how: str) -> InputError:
    return InputError(
        f"{type(model).__name__} does not separate the documents in one row ({how}); "
        "set data.packing to wrapped or padded"
    )
