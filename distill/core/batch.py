"""What a batch holds, and what of it a model reads.

A batch is a dict of tensors [batch, sequence], made once, by :func:`distill.data.packed_rows.batch_of` or by
:class:`distill.data.text_rows.TextRows`:

    input_ids      int64  the tokens that the model reads
    targets        int64  what the model shall predict at each position: the token that follows
    mask           bool   whether the prediction at a position counts; ``targets`` means nothing where it is False
    position_ids   int64  only where documents share a row and must not see each other: starts anew with each of them

    attention_mask int64  only in padded rows of other tasks than the next token: 0 for padding
    token_type_ids int64  only for pairs of texts: 1 in the second text
    text_mask      bool   only with ``masked_lm``: positions that losses on the text count, the masked tokens; ``mask``
                          then says which ones all other losses count
    text_weight    float  [] with ``text_mask``: factor of the losses on the text

A task other than the next token has other targets, and for one prediction per text ``targets`` and ``mask`` are
[batch, 1]; see :mod:`distill.data.text_rows`. Training adds

    kept           int64  [tokens] only in training, positions of the flattened batch that count; computed on the CPU,
                   because nonzero() on a GPU makes the CPU wait
    is_sampled     bool   [] only in training, True in a batch that the student has written, whose rows do not return

Nothing after it shifts tokens or guesses where a document ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEPT = "kept"
SAMPLED = "is_sampled"
IGNORED = -100
"""Label of a token that is not learned from, in transformers."""
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def causal_batch(input_ids: Any, mask: Any, **more: Any) -> dict[str, Any]:
    """A batch in which each position predicts the token that follows it.

    Args:
        input_ids: int64 [batch, sequence].
        mask: bool [batch, sequence]; False at least at the last position of each row, which nothing follows.
        more: further tensors of the batch, such as ``position_ids``.
    """
    targets = input_ids.roll(-1, dims=-1)  # the last position gets the row's first token, which never counts
    return {"input_ids": input_ids, "targets": targets, "mask": mask, **more}


def batch_of_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of transformers' own form, with ``labels``, in the form above.

    Args:
        batch: ``input_ids`` int64 [batch, sequence]; ``labels`` int64 [batch, sequence], the same tokens, with -100
            where a token is not learned from; optionally ``attention_mask`` [batch, sequence] and ``position_ids``.
    """
    labels, causal = batch["labels"], causal_batch(batch["input_ids"], batch["labels"] != IGNORED)
    mask = causal["mask"].roll(-1, dims=-1)  # a label stands at its own token, a target at the one before
    mask[..., -1] = False
    if "attention_mask" in batch:
        mask = mask & batch["attention_mask"].bool()
    more = {name: batch[name] for name in MODEL_INPUTS[1:] if name in batch}
    return {**causal, "targets": labels.roll(-1, dims=-1).clamp(min=0), "mask": mask, **more}


def model_inputs(batch: Mapping[str, Any], device: Any = None) -> dict[str, Any]:
    """The arguments of a model's forward.

    Args:
        batch: tensors by name, see above; an ``attention_mask`` [batch, sequence] is handed on too.
        device: where the model is; None leaves them where they are.
    """
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    return inputs if device is None else {name: tensor.to(device) for name, tensor in inputs.items()}


def reads_token_types(config: Any) -> bool:
    """Whether a model tells the two texts of a pair apart; RoBERTa takes token types, but has one type only."""
    return (getattr(config, "type_vocab_size", 0) or 0) > 1


def known_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a model without token types where it has none.

    Args:
        model: of transformers.
        inputs: arguments of its forward.
    """
    known = dict(inputs)
    if not reads_token_types(getattr(model, "config", None)):
        known.pop("token_type_ids", None)
    return known
