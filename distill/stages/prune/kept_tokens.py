"""Which tokens of a vocabulary stay, by the training text of the run, and models loaded in them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from transformers import PretrainedConfig

from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.data.cut_tokenizer import tokens_to_keep
from distill.data.stream import Stream
from distill.models.load import load_config
from distill.pretrained import generation_config_from
from distill.pruning.token_ids import TOKEN_KEYS
from distill.stages.session import StageContext

STRETCH = 1 << 24
"""Tokens that are counted at once."""


def tokens_of(context: StageContext, location: str, wanted: int | Literal["used"]) -> list[int]:
    """The ids of the tokens to keep, in ascending order.

    Args:
        context: of the stage; its text is read in the model's own tokens.
        location: the model's folder or Hub id.
        wanted: how many, or those that the training text has.

    Raises:
        InputError: the text is a stream, or the tokenizer cannot be cut so.
    """
    train = context.session.corpus().train
    if isinstance(train, Stream):
        raise InputError("keep.vocabulary: a stream is not read before it is trained on; store its text, or keep all")
    tokenizer = context.session.tokenizer()
    counts = np.zeros(len(tokenizer), np.int64)
    ids = train.ids()
    for start in stoppable(range(0, len(ids), STRETCH)):
        counts += np.bincount(ids[start : start + STRETCH], minlength=len(counts))
    named = _named(location, load_config(location))
    kept = tokens_to_keep(tokenizer, counts, None if wanted == "used" else wanted, named)
    share = counts[kept].sum() / counts.sum()
    context.say(f"{len(kept):,} of {len(tokenizer):,} tokens stay, which are {share:.2%} of the training text")
    return kept


def _named(location: str, config: PretrainedConfig) -> list[int]:
    """Ids that the config and the generation config name."""
    named = [config.to_dict()]
    if (generation := generation_config_from(location)) is not None:
        named.append(generation.to_dict())
    found: list[int] = []
    for values in named:
        for key in TOKEN_KEYS:
            value = values.get(key)
            found += [id_ for id_ in (value if isinstance(value, list) else [value]) if id_ is not None]
    return found
