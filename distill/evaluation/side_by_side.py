"""Greedy answers of several models to the same prompts, with the first different token marked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.evaluation.engine_process import EngineProcess
from distill.evaluation.greedy import greedy
from distill.models.load import load_model, locate
from distill.pretrained import tokenizer_from

Prompt = str | list[dict[str, str]]
"""Text to continue, or chat messages for the tokenizer's chat template."""
Encode = Callable[[Any, Prompt], list[int]]
"""(tokenizer, prompt) -> input ids."""


@dataclass(frozen=True)
class Answer:
    """The answer of one model to one prompt.

    Attributes:
        text: answer without special tokens.
        ends: for each token, the number of characters of ``text`` up to the end of this token.
        seconds: wall-clock time of the generation.
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
    encode: Encode | None = None,
) -> list[dict[str, Any]]:
    """Generate the answer of each model to each prompt. Only one model is in memory at a time.

    Args:
        models: name -> folder (with tokenizer) or Hub id. The other models are compared with the first.
        prompts: texts to continue, or lists of chat messages.
        new_tokens: largest number of tokens of an answer.
        device: torch device.
        dtype: "auto" (as stored) or the name of a torch dtype.
        simulated: names of models whose low-bit arithmetic is simulated; their seconds are None in the result.
        encode: function that encodes prompts; None for the model's own tokenizer and template.

    Returns:
        a dict a prompt: ``{"prompt": str, "answers": {name: {"text", "tokens", "words", "seconds", "mark"}}}``.
        ``mark`` is ``[start, end]`` in characters of the first token that differs from the first model's answer,
        ``[n, n]`` where the answer stops early, and None where nothing differs.

    Raises:
        InputError: a model cannot be loaded, or a prompt is empty.
    """
    given = {
        name: answers_of(location, prompts, new_tokens=new_tokens, device=device, dtype=dtype, encode=encode)
        for name, location in stoppable(models.items())
    }
    return align(prompts, given, simulated)


def answers_of(
    location: str | Path,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    device: str = "cpu",
    dtype: str = "auto",
    encode: Encode | None = None,
) -> list[Answer]:
    """One model's answers; see :func:`side_by_side`. The model is not in memory any more when they are there."""
    tokenizer = tokenizer_from(locate(str(location)))
    model = load_model(str(location), dtype=dtype, device=device)
    return [answer(model, tokenizer, prompt, new_tokens, encode or _encode) for prompt in stoppable(prompts)]


def answers_in_engine(
    process: EngineProcess,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    ends: Sequence[int],
    encode: Encode | None = None,
) -> list[Answer]:
    """Greedy answers of a model in its engine.

    Args:
        process: of the engine.
        tokenizer: of the model.
        prompts: as in :func:`side_by_side`.
        new_tokens: most tokens of an answer.
        ends: ids that end an answer.
        encode: as in :func:`side_by_side`.

    Raises:
        InputError: a prompt is empty.
    """
    found = []
    for prompt in stoppable(prompts):
        ids = (encode or _encode)(tokenizer, prompt)
        if not ids:
            raise _empty(prompt)
        started = time.perf_counter()
        written = process.write(ids, new_tokens, lambda so_far: so_far[-1] in ends)
        found.append(_answer(tokenizer, written, time.perf_counter() - started))
    return found


def _empty(prompt: Prompt) -> InputError:
    return InputError(f"prompts: {prompt!r} has no tokens; give a text of at least one token")


def _answer(tokenizer: Any, new: list[int], seconds: float) -> Answer:
    text = tokenizer.decode(new, skip_special_tokens=True)
    pieces = [tokenizer.decode(new[: k + 1], skip_special_tokens=True) for k in range(len(new))]
    # A token may hold half a character: only what has its final form in the text counts as completed.
    return Answer(text, [_common(text, piece) for piece in pieces], seconds)


def align(
    prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Answer]], simulated: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Combine the answers of several models; see :func:`side_by_side` for the result."""
    rows = []
    for i, prompt in enumerate(prompts):
        first = next(iter(answers.values()))[i]
        cells = {
            name: {
                "text": given[i].text,
                "tokens": len(given[i].ends),
                "words": len(given[i].text.split()),
                "seconds": None if name in simulated else given[i].seconds,
                "mark": first_difference(first.text, given[i]),
            }
            for name, given in answers.items()
        }
        rows.append({"prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"], "answers": cells})
    return rows


def first_difference(reference: str, given: Answer) -> list[int] | None:
    """Characters [start, end) of the first token of ``given`` that differs from ``reference``; None if none differs."""
    if given.text == reference:
        return None
    same = _common(reference, given.text)
    token = next((k for k, end in enumerate(given.ends) if end > same), None)
    if token is None:
        return [len(given.text), len(given.text)]
    return [min(same, given.ends[token - 1] if token else 0), given.ends[token]]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: Prompt, new_tokens: int, encode: Encode) -> Answer:
    """The greedy answer of a transformers model. Its own generation settings are not used.

    Raises:
        InputError: the prompt has no tokens, or the tokenizer has no template for chat messages.
    """
    ids = torch.tensor([encode(tokenizer, prompt)], dtype=torch.int64, device=model.device)
    if ids.numel() == 0:
        raise _empty(prompt)
    eos = getattr(model.generation_config, "eos_token_id", None)
    ends = eos if isinstance(eos, list) else [eos]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] or 0)
    settings = greedy(new_tokens, eos, padding)
    started = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    new = output[0, ids.size(1) :].tolist()
    return _answer(tokenizer, new, time.perf_counter() - started)


def _common(one: str, other: str) -> int:
    """Length of the common prefix of two texts, in characters."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise InputError("prompts: chat messages were given, but the tokenizer has no chat template; give plain texts")
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
