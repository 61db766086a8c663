"""Where own sequences begin: all that stands before one turn of the assistant, in whichever row it is packed."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from distill.data.packed_rows import batch_of
from distill.training.on_policy import OnPolicy
from distill.training.sampling_prompts import of_conversations
from distill.training.spec import OnPolicySpec

FILLING, NEW, MOST = 9, 4, 20
# (tokens of the prompt, tokens of the answer), turn by turn, of the conversations of each row
ROWS = [[[(3, 2), (4, 3)], [(2, 1)]], [[(5, 4)]], [[(1, 2), (1, 1), (2, 2)]]]


def batch(rows: Any = ROWS, *, apart: bool = True) -> dict[str, torch.Tensor]:
    """Ids of 10 and more, no token twice in a row."""
    length = 2 + max(sum(a + b for turns in row for a, b in turns) for row in rows)
    ids, learned = np.full((len(rows), length), FILLING), np.ones((len(rows), length), bool)
    pieces = []
    for number, row in enumerate(rows):
        which = [flag for turns in row for a, b in turns for flag in [False] * a + [True] * b]
        ids[number, : len(which)] = np.arange(len(which)) + 10 + 100 * number
        learned[number, : len(which)] = which
        sizes = [sum(a + b for a, b in turns) for turns in row]
        pieces.append(list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True)))
    return batch_of(ids, pieces, learned, apart=apart)


def expected(number: int, rows: Any = ROWS) -> list[tuple[list[int], list[int]]]:
    """(prompt, what follows it) of each turn of a row."""
    found, at = [], 10 + 100 * number
    end = at + sum(a + b for turns in rows[number] for a, b in turns)
    for turns in rows[number]:
        start, place = at, at
        for asked, answered in turns:
            place += asked
            follows = [token if token < end else FILLING for token in range(place, place + NEW)]
            found.append((list(range(start, place)), follows))
            place += answered
        at = place
    return found


def test_a_prompt_is_all_of_its_conversation_before_a_turn() -> None:
    turns = [len(expected(number)) for number in range(len(ROWS))]
    for chosen in itertools.product(*map(range, turns)):
        drawn = torch.tensor([(one + 0.5) / of for one, of in zip(chosen, turns, strict=True)], dtype=torch.float64)
        prompts = of_conversations(batch(), drawn, MOST, NEW, FILLING)
        for number, one in enumerate(chosen):
            prompt, follows = expected(number)[one]
            assert prompts.ids[number, : prompts.lengths[number]].tolist() == prompt
            assert prompts.passages[number].tolist() == follows
        assert prompts.are_there.all()
        assert prompts.places is None


def test_a_row_that_is_filled_up_has_no_places() -> None:
    rows = [row[:1] for row in ROWS]
    drawn = torch.zeros(3, dtype=torch.float64)
    one, other = (of_conversations(batch(rows, apart=apart), drawn, MOST, NEW, FILLING) for apart in (True, False))
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.lengths, other.lengths)


def test_turns_with_a_longer_prompt_are_not_chosen() -> None:
    for drawn in (0.0, 0.99):
        prompts = of_conversations(batch(), torch.full((3,), drawn, dtype=torch.float64), 3, NEW, FILLING)
        assert prompts.lengths.tolist()[1] == 1
        assert prompts.are_there.tolist() == [True, False, True]
        assert prompts.lengths.max() <= 3


def test_the_seed_the_step_and_the_place_choose_and_nothing_else() -> None:
    def policy(seed: int) -> OnPolicy:
        spec = OnPolicySpec(share=1.0, max_new_tokens=NEW)
        return OnPolicy(spec, seed=seed, ends=(FILLING,), vocabulary=400, row_of_conversations=MOST + NEW)

    whole = batch()

    def prompts(seed: int, step: int, places: range) -> list[list[int]]:
        some = {key: value[places.start : places.stop] for key, value in whole.items()}
        made = policy(seed)._prompts(some, step, places)
        return [ids[:length].tolist() for ids, length in zip(made.ids, made.lengths, strict=True)]

    together = prompts(0, 5, range(3))
    assert together == prompts(0, 5, range(1)) + prompts(0, 5, range(1, 3))
    assert len({str(prompts(seed, step, range(3))) for seed in range(3) for step in range(3)}) > 4


def test_a_row_without_a_turn_learns_nothing() -> None:
    some = batch()
    some["mask"][0] = False
    prompts = of_conversations(some, torch.zeros(3, dtype=torch.float64), MOST, NEW, FILLING)
    assert prompts.are_there.tolist() == [False, True, True]


@pytest.mark.parametrize("set", [{}, {"prompt_tokens": 5}])
def test_prompts_of_text_are_as_long_as_the_recipe_says(set: dict[str, int]) -> None:
    spec = OnPolicySpec(max_new_tokens=NEW, **set)
    assert spec.of_text == set.get("prompt_tokens", 32)
    assert spec.num_tokens() == spec.of_text + NEW
