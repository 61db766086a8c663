"""A causal model taken apart at its last hidden state: the body, and the head with all that scales its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from distill.core.errors import InputError
from distill.losses.head import Head

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def hidden_states(model: PreTrainedModel, input_ids: Tensor, **arguments: Tensor) -> Tensor:
    """Final hidden states, after the last norm.

    Args:
        model: a causal language model.
        input_ids: [batch, sequence].
        arguments: what else the body takes, such as ``position_ids`` [batch, sequence].

    Returns:
        [batch, sequence, hidden].
    """
    return model.base_model(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state


def output_head(model: PreTrainedModel) -> Head:
    """The model's head as a callable that calls its own module, with soft-cap and scales applied.

    Raises:
        InputError: the model has no output embeddings.
    """
    module, config = model.get_output_embeddings(), model.config
    if module is None:
        raise InputError(f"{type(model).__name__} has no output head, so it gives no logits to learn from")
    softcap = getattr(config, "final_logit_softcapping", None)
    multiply = getattr(config, "logit_scale", None) or 1.0
    divide = getattr(config, "logits_scaling", None) or 1.0

    def logits(hidden: Tensor) -> Tensor:
        out = module(hidden)
        if multiply != 1.0 or divide != 1.0:
            out = out * (multiply / divide)
        if softcap:
            out = torch.tanh(out / softcap) * softcap
        return out

    return Head(logits, tuple(module.parameters()))


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Hold body + head against the model's own forward on four tokens, so that no architecture is trained wrongly.

    Raises:
        InputError: they differ: the architecture does something between the two that we do not know.
    """
    ids = torch.arange(4, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    ours = output_head(model).logits(hidden_states(model, ids)).float()
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    difference = (ours - theirs).abs().max().item()
    if not difference <= 1e-3 * max(1.0, theirs.abs().max().item()):
        raise InputError(
            f"{type(model).__name__} does something between its hidden states and its logits that distill does not "
            f"know (they differ by {difference:.3g}); this architecture cannot be trained here yet"
        )
