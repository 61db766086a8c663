"""Random mixtures: whatever the sizes, weights, packing and kinds, the order is exact and the shares are the weights.

``python -m tests.data.test_mixture_fuzz 60`` tries seeds for a minute.
"""

import copy
import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from distill.core.errors import InputError
from distill.data.corpus import Corpus
from distill.data.loader import order_of
from distill.data.micro_batches import MicroBatches
from distill.data.spec import DataSpec
from distill.data.tokenizer import train_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
WORDS = ["the", "quick", "brown", "fox", "naïve", "東京", "🍣", "jumps", "over", "lazy", "dog", "a"]
NUM_POSITIONS = 400


def text_of(draw, most):
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most))) + f" №{draw.randint(0, 10**6)}"


def mixture_of(draw, folder):
    """A data section, and the names of its sources."""
    sources, validation, weights = {}, {}, {}
    for number in range(draw.randint(1, 5)):
        name, is_chat = f"source{number}", draw.random() < 0.4
        count, most = int(10 ** draw.uniform(0.5, 2)), int(10 ** draw.uniform(0, 2.2))
        for place, some in ((sources, count), (validation, draw.randint(0, 4))):
            rows = [
                {"prompt": text_of(draw, most), "response": text_of(draw, most)}
                if is_chat
                else {"text": text_of(draw, most)}
                for _ in range(some)
            ]
            if draw.random() < 0.1:
                rows.append({"neither": 1})
            if rows:
                file = folder / f"{name}-{place is sources}.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                place[name] = {"kind": "chat" if is_chat else "jsonl", "path": str(file)}
        weights[name] = 10 ** draw.uniform(-2, 2)
    holds_chats = any(one["kind"] == "chat" for one in [*sources.values(), *validation.values()])
    train = {"kind": "mixture", "sources": sources, "validation": validation, "max_repeats": 10 ** draw.uniform(-1, 3)}
    train |= draw.choice([{"weights": weights}, {"temperature": draw.choice([0.5, 1.0, 4.0])}])
    packings = ["best_fit", "padded"] if holds_chats else ["wrapped", "documents", "best_fit", "padded"]
    data = {"train": train, "sequence_length": draw.choice([8, 32, 100]), "packing": draw.choice(packings)}
    data |= {"held_out": draw.choice([0.05, 0.5]), "max_dropped": draw.choice([0.0, 0.2, 1.0])}
    data |= {"chat": {"template": TEMPLATE, "too_long": draw.choice(["drop", "cut_turns"])}} if holds_chats else {}
    if draw.random() < 0.2:
        data["clean"] = {"duplicates": draw.choice(["exact", "near"])}
    return data


def one_line(error):
    """Whether what a user is told is one line."""
    return len(str(error)) > 0 and "\n" not in str(error)


def try_mixture(seed, folder, tokenizer):
    """Make a mixture and check all of it; whether it could be opened."""
    draw = random.Random(seed)
    try:
        data = DataSpec.model_validate(mixture_of(draw, folder))
        corpus = Corpus.open(data, tokenizer, folder / "data", seed, 400)
    except (InputError, ValidationError) as error:
        refused = error
    else:
        refused = None
    if isinstance(refused, ValidationError):  # of the section itself; a recipe makes a line of each
        assert all(one_line(mistake["msg"]) for mistake in refused.errors()), refused
        return False
    if refused is not None:
        assert one_line(refused), refused
        return False
    check_order(corpus, draw)
    check_shares(corpus)
    check_batches(corpus, draw)
    check_repeats(corpus, data, draw)
    return True


def check_order(corpus, draw):
    """A position tells its row wherever one starts, and a pass over a source holds each of its rows once."""
    blocks, source = corpus.train, corpus.train.source_of_rows()
    order = order_of(blocks, corpus.seed, MicroBatches(1))
    rows = np.array([order.row_at(position) for position in range(NUM_POSITIONS)])
    for start in [draw.randrange(NUM_POSITIONS - 20) for _ in range(4)]:
        fresh = order_of(blocks, corpus.seed, MicroBatches(1))
        assert [fresh.row_at(start + i) for i in range(20)] == rows[start : start + 20].tolist()
    if blocks.packing == "padded":  # sorted within a lap, which may cut a pass
        return
    for number in range(len(blocks.tokens.parts)):
        own, size = rows[source[rows] == number], int((source == number).sum())
        for start in range(0, len(own) - size + 1, size):
            assert len({*own[start : start + size].tolist()}) == size


def check_shares(corpus):
    """After any number of rows, each source has its share of the tokens within the bound of ``mixture_order``."""
    blocks, parts = corpus.train, corpus.train.tokens.parts
    weights = np.array([part.weight for part in parts]) / sum(part.weight for part in parts)
    order, source = order_of(blocks, corpus.seed, MicroBatches(1)), blocks.source_of_rows()
    rows = np.array([order.row_at(position) for position in range(NUM_POSITIONS)])
    lengths = blocks.lengths()[rows]
    given = np.zeros((NUM_POSITIONS, len(parts)))
    given[np.arange(NUM_POSITIONS), source[rows]] = lengths
    off = np.abs(given.cumsum(0) - lengths.cumsum()[:, None] * weights)
    bound = (1 + len(parts) * weights) / 2 * blocks.sequence_length + 1e-6
    if blocks.packing != "padded":
        assert (off <= bound).all()


def check_batches(corpus, draw):
    """Ranks, micro-batches and workers read the rows of one process, also from the middle on."""

    def read(taken, count, workers=0):
        batches = itertools.islice(corpus.train_loader(taken, workers), count)
        return [
            [ids[: int(np.flatnonzero(mask).max(initial=0)) + 2].tolist() for ids, mask in zip(*both, strict=True)]
            for batch in batches
            for both in [(batch["input_ids"], batch["mask"].numpy())]
        ]

    straight = [row for batch in read(MicroBatches(1), 24) for row in batch]
    micro, world, start = draw.choice([(1, 2, 6), (2, 1, 3), (3, 2, 0), (2, 3, 12)])
    ranks = [read(MicroBatches(micro, start, rank, world), (24 - start) // (micro * world)) for rank in range(world)]
    again = [row for step in zip(*ranks, strict=True) for batch in step for row in batch]
    assert again == straight[start : start + len(again)]


def check_repeats(corpus, data, draw):
    """As many passes are counted as are read, and more than the recipe allows are refused in one line."""
    blocks, source = corpus.train, corpus.train.source_of_rows()
    order = order_of(blocks, corpus.seed, MicroBatches(1))
    rows = np.array([order.row_at(position) for position in range(NUM_POSITIONS)])
    times, lengths = corpus.passes(NUM_POSITIONS), blocks.lengths()
    total = lengths[rows].sum()
    for number, part in enumerate(blocks.tokens.parts):
        own = lengths[source == number].sum()
        # the forecast takes rows of a mean length, of which the first ones may differ
        read = lengths[rows][source[rows] == number].sum() / total * NUM_POSITIONS * corpus.tokens_per_sequence / own
        off = (2 + len(blocks.tokens.parts)) * blocks.sequence_length * NUM_POSITIONS * corpus.tokens_per_sequence
        if blocks.packing != "padded":
            assert abs(times[part.name] - read) <= off / total / own + 1e-9
    too_often = [name for name, often in times.items() if often > data.train.max_repeats]
    if not too_often:
        data.train.check_repeats(times)
        return
    with pytest.raises(InputError) as refused:
        data.train.check_repeats(times)
    assert one_line(refused.value)
    assert all(name in str(refused.value) for name in too_often)


@pytest.fixture(scope="module")
def chatty(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


def test_random_mixtures(chatty, tmp_path):
    opened = 0
    for seed in range(10):
        folder = tmp_path / str(seed)
        folder.mkdir()
        opened += try_mixture(seed, folder, chatty)
    assert opened >= 4  # else nothing was tried


if __name__ == "__main__":
    until, tried, good = time.monotonic() + float(sys.argv[1]), 0, 0
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as place:
        draw = random.Random(0)
        own = train_tokenizer((text_of(draw, 30) for _ in range(200)), 400, Path(place) / "tokenizer")
        own.chat_template = TEMPLATE
        while time.monotonic() < until:
            with tempfile.TemporaryDirectory(dir=place) as one:
                try:
                    good += try_mixture(first + tried, Path(one), own)
                except BaseException:
                    print(f"seed {first + tried}", flush=True)
                    raise
            tried += 1
    print(f"{tried} mixtures, {good} opened")
