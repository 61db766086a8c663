"""Whether the models of a recipe have the run's tokens, as far as their tokenizers are on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from distill.core.outside import read_json
from distill.forecast.look import tokenizer_file
from distill.recipe import Recipe
from distill.stages.base import SELF


def other_vocabularies(recipe: Recipe) -> Iterator[str]:
    """A line for each model that gives the run's token ids another meaning, as the run would refuse it.

    Compared is what decides an id: the tokens, the added tokens and the merges of ``tokenizer.json``.
    """
    wanted = recipe.data.tokenizer
    named = recipe.teacher if wanted == "teacher" else wanted
    ours = _tokens(named) if isinstance(named, str) and named not in recipe.stages else None
    if ours is None:
        return
    seen = {named, SELF, "teacher" if named == recipe.teacher else None, *recipe.stages}
    for name, stage in recipe.stages.items():
        for path, reference in stage.same_tokens():
            located = recipe.teacher if reference == "teacher" else reference
            if reference in seen or located in seen or located is None:
                continue
            seen.add(located)
            theirs = _tokens(located)
            if theirs is not None and theirs != ours:
                key = ".".join(map(str, ("stages", name, *path)))
                yield (
                    f"{key}: {located} has {len(theirs)} tokens and the run's tokenizer ({named}) {len(ours)}, "
                    f"{_first_difference(ours, theirs)}; take models of one tokenizer"
                )


def _tokens(reference: str) -> dict[str, int] | None:
    """Token -> id; None where its tokenizer is not on this machine, or has another form."""
    if (file := tokenizer_file(reference)) is None:
        return None
    found: Any = read_json(file)
    vocabulary = (found.get("model") or {}).get("vocab")
    if isinstance(vocabulary, list):  # unigram: pairs of token and score
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        return None
    return vocabulary | {token["content"]: token["id"] for token in found.get("added_tokens") or ()}


def _first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    """Where they part, in words."""
    by_id = [{index: token for token, index in tokens.items()} for tokens in (ours, theirs)]
    first = next(i for i in sorted({*by_id[0], *by_id[1]}) if by_id[0].get(i) != by_id[1].get(i))
    return f"token {first} is {json.dumps(by_id[1].get(first))} and {json.dumps(by_id[0].get(first))}"
