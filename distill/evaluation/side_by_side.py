"""The same prompts to several models, answered greedily, with the first token that differs marked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.core.errors import InputError

Prompt = str | list[dict[str, str]]
"""Text to go on with, or chat messages for the tokenizer's own template."""


@dataclass(frozen=True)
class Answer:
    """One model's answer to one prompt.

    Attributes:
        text: the answer without special tokens.
        ends: characters of ``text`` that each token completes, cumulative.
        seconds: wall-clock time of the whole generation.
    """

    text: str
    ends: list[int]
    seconds: float


def side_by_side(
    models: Mapping[str, str | Path],
    prompts: Sequence[Prompt],
    *,
    new_tokens: int = 64,
    device: str = "cpu",
    dtype: str = "auto",
    simulated: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Let each model answer each prompt; only one model is in memory at a time.

    Args:
        models: name -> folder (with tokenizer) or Hub id; the first is the one that the others are held against.
        prompts: texts to continue, or lists of chat messages.
        new_tokens: most tokens of an answer.
        device: torch device.
        dtype: "auto" (as stored) or a torch type's name.
        simulated: names of models whose low-bit arithmetic is simulated here; their seconds are left out.

    Returns:
        a dict a prompt: ``{"prompt": str, "answers": {name: {"text", "tokens", "seconds", "mark"}}}``. ``mark`` is
        ``[start, end]`` in characters of the first token that differs from the first model's answer, ``[n, n]`` where
        the answer stops early, and None where nothing differs.

    Raises:
        InputError: a model cannot be loaded, or a prompt is empty.
    """
    from transformers import AutoTokenizer

    from distill.models.load import load_model

    answers: dict[str, list[Answer]] = {}
    for name, location in models.items():
        try:
            tokenizer = AutoTokenizer.from_pretrained(location)
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"{name}: {location} cannot be loaded: {str(error).splitlines()[0]}") from None
        model = load_model(str(location), dtype=dtype, device=device)
        answers[name] = [answer(model, tokenizer, prompt, new_tokens) for prompt in prompts]
        del model
    return align(prompts, answers, simulated)


def align(
    prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Answer]], simulated: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Put answers of several models beside each other; see :func:`side_by_side` for the result."""
    rows = []
    for i, prompt in enumerate(prompts):
        first = next(iter(answers.values()))[i]
        cells = {
            name: {
                "text": given[i].text,
                "tokens": len(given[i].ends),
                "seconds": None if name in simulated else given[i].seconds,
                "mark": first_difference(first.text, given[i]),
            }
            for name, given in answers.items()
        }
        rows.append({"prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"], "answers": cells})
    return rows


def first_difference(reference: str, given: Answer) -> list[int] | None:
    """Characters [start, end) of the first token of ``given`` that departs from ``reference``; None if none does."""
    if given.text == reference:
        return None
    same = _common(reference, given.text)
    token = next((k for k, end in enumerate(given.ends) if end > same), None)
    if token is None:
        return [len(given.text), len(given.text)]
    return [min(same, given.ends[token - 1] if token else 0), given.ends[token]]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: Prompt, new_tokens: int = 64) -> Answer:
    """A transformers model's greedy answer; its folder's own sampling settings are put aside, so that models compare.

    Raises:
        InputError: the prompt has no tokens, or chat messages meet a tokenizer without a template.
    """
    from transformers import GenerationConfig

    ids = _encode(tokenizer, prompt).to(model.device)
    eos = getattr(model.generation_config, "eos_token_id", None)
    ends = eos if isinstance(eos, list) else [eos]
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] or 0),
    )
    started = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    new = output[0, ids.size(1) :].tolist()
    seconds = time.perf_counter() - started
    text = tokenizer.decode(new, skip_special_tokens=True)
    pieces = [tokenizer.decode(new[: k + 1], skip_special_tokens=True) for k in range(len(new))]
    # A token may hold half a character: only what has its final form in the text counts as completed.
    return Answer(text, [_common(text, piece) for piece in pieces], seconds)


def _common(one: str, other: str) -> int:
    """Characters that two texts have in common from their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _encode(tokenizer: Any, prompt: Prompt) -> torch.Tensor:
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    elif tokenizer.chat_template is None:
        raise InputError("prompts: chat messages were given, but the tokenizer has no chat template; give plain texts")
    else:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    if ids.numel() == 0:
        raise InputError(f"prompts: {prompt!r} has no tokens; give a text of at least one token")
    return ids
