"""Settings for greedy decoding. The model's own generation settings are not used, so that models are comparable."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig


def greedy(max_new_tokens: int, ends: Any, padding: int, stops: list[str] | None = None) -> GenerationConfig:
    """Settings for ``generate``.

    Args:
        max_new_tokens: largest number of new tokens.
        ends: id or ids of the end-of-text tokens.
        padding: id that pads finished sequences.
        stops: strings at which generation stops too; ``generate`` then needs the tokenizer.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends,
        pad_token_id=padding,
        stop_strings=stops,
    )
