"""Which tokens of a vocabulary stay, by the training text of the run, and models loaded in them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from distill.core.errors import InputError
from distill.stages.base import StageContext

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

STRETCH = 1 << 24
"""Tokens that are counted at once."""


def tokens_of(context: StageContext, location: str, wanted: int | Literal["used"]) -> list[int]:
    """The ids of the tokens to keep, rising.

    Args:
        context: of the stage; its text is read in the model's own tokens.
        location: the model's folder or Hub id.
        wanted: how many, or those that the training text has.

    Raises:
        InputError: the text is a stream, or the tokenizer cannot be cut so.
    """
    import numpy as np

    from distill.data.blocks import Blocks
    from distill.data.cut_tokenizer import tokens_to_keep
    from distill.models.load import load_config

    train = context.session.corpus().train
    if not isinstance(train, Blocks):
        raise InputError("keep.vocabulary: a stream is not read before it is trained on; store its text, or keep all")
    tokenizer = context.session.tokenizer()
    counts = np.zeros(len(tokenizer), np.int64)
    ids = train.tokens.ids()
    for start in range(0, len(ids), STRETCH):
        counts += np.bincount(ids[start : start + STRETCH], minlength=len(counts))
    named = _named(location, load_config(location))
    kept = tokens_to_keep(tokenizer, counts, None if wanted == "used" else wanted, named)
    share = counts[kept].sum() / counts.sum()
    context.say(f"{len(kept):,} of {len(tokenizer):,} tokens stay, which are {share:.2%} of the training text")
    return kept


def _named(location: str, config: PretrainedConfig) -> list[int]:
    """Ids that the config and the generation config name."""
    from transformers import GenerationConfig

    from distill.pruning.tokens import TOKEN_KEYS

    named = [config.to_dict()]
    with suppress(OSError):  # a model need not have one
        named.append(GenerationConfig.from_pretrained(location).to_dict())
    found: list[int] = []
    for values in named:
        for key in TOKEN_KEYS:
            value = values.get(key)
            found += [id_ for id_ in (value if isinstance(value, list) else [value]) if id_ is not None]
    return found


def load_speaking(context: StageContext, location: str, dtype: str) -> PreTrainedModel:
    """A model in the tokens of the stage; where those are a part of its own it is cut down to them as it is read.

    Its distribution over the tokens that stay is then its own, renormalised over them.

    Args:
        context: of the stage.
        location: the model's folder or Hub id.
        dtype: of the weights in memory; "auto" is that of the file.

    Raises:
        InputError: it speaks other tokens, or its architecture cannot be cut.
    """
    import torch

    from distill.data.cut_tokenizer import rows_of
    from distill.data.tokenizer import load_tokenizer
    from distill.models.layouts import layout_for
    from distill.models.load import load_config, load_model
    from distill.models.shards import carve_folder
    from distill.pruning.base import Scores
    from distill.pruning.plan import plan
    from distill.stages.train import check_speaks, stored_dtype_of

    session, config = context.session, load_config(location).to_dict()
    whole = load_tokenizer(location) if session.is_cut else session.tokenizer()
    rows = rows_of(session.tokenizer(), whole) if session.is_cut else None
    if rows is None or len(rows) == len(whole):
        check_speaks(context, location)
        return load_model(location, dtype=dtype)
    layout = layout_for(config["model_type"])
    part = plan(Scores(), {}, layout, config, vocabulary=rows)
    model = carve_folder(location, part, layout, getattr(torch, stored_dtype_of(location, dtype)))
    return model.eval()
