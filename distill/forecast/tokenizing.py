"""How long a text takes to tokenize, and how much room its tokens need, where that is worth a line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from distill.data.base import digest, normalised
from distill.data.token_processes import num_processes
from distill.forecast.look import pieces_of
from distill.forecast.machine import duration
from distill.forecast.memory_limit import amount

LONG_BYTES = 50_000_000
"""Of text, below which nothing is said: it is tokenized in some seconds."""
SAMPLE_CHARACTERS = 500_000
"""Encoded so that words are known, and as many again to measure."""


@dataclass(frozen=True)
class Rates:
    """How fast this machine's CPU works on a text, in bytes of UTF-8 per second of one process.

    Attributes:
        encoding: text to ids; any number of processes do it.
        splitting: to find the side of the split of each document; the same processes do it.
        bytes_per_id: in the token file.
    """

    encoding: float
    splitting: float
    bytes_per_id: int


def rates_of(backend: Tokenizer, texts: Sequence[str]) -> Rates | None:
    """Measured on some texts; None where they are too few to say anything."""
    from distill.data.word_cache import WordCache

    sample = pieces_of(list(texts), 2 * SAMPLE_CHARACTERS)
    half = len(sample) // 2
    if not half:
        return None
    words = WordCache.of(backend)
    encode = backend.encode_batch_fast if words is None else words.encode
    encode(sample[:half])
    measured = sample[half:]
    num_bytes = sum(len(text.encode("utf-8")) for text in measured)
    start = time.process_time()  # of all threads
    encode(measured)
    encoded = time.process_time()
    for text in measured:
        digest(normalised(text))
    split = time.process_time()
    rates = num_bytes / max(encoded - start, 1e-6), num_bytes / max(split - encoded, 1e-6)
    return Rates(*rates, bytes_per_id(backend))


def bytes_per_id(backend: Tokenizer) -> int:
    """Of a token in a token file."""
    return 2 if backend.get_vocab_size() <= 1 << 16 else 4


def about_tokenizing(
    num_tokens: float, bytes_per_token: float, rates: Rates | None, num_machines: int = 1
) -> Iterator[str]:
    """A line where it takes long.

    Args:
        num_tokens: to train on and to validate on.
        bytes_per_token: of UTF-8.
        rates: of this machine; None: not measured.
        num_machines: like this one, that the run uses.
    """
    num_bytes = num_tokens * bytes_per_token
    if rates is None or num_bytes < LONG_BYTES:
        return
    number = num_processes()
    seconds = num_bytes * (1 / rates.encoding + 1 / rates.splitting) / number / num_machines
    who = f"by {number} processes" if number > 1 else "by one process"
    where = "on this machine" if num_machines == 1 else f"on each of {num_machines} machines like this one"
    room = amount(num_tokens * rates.bytes_per_id)
    yield (
        f"tokenized once, before the first stage that reads it: about {duration(seconds)} {who} {where}, or "
        f"longer where rows are slow to read; {room} in the run's data folder, twice as much for a moment"
    )
