"""Encodes ascending numbers in few bits: the ids that a codec stores, for all positions of a row together.

An id at position p becomes the number p * vocabulary + id, so the numbers of a row ascend. Each number is split. The
lowest ``low`` bits are stored as they are:

    low = floor(log2(universe / count)),   universe = positions * vocabulary,   count = stored numbers

The rest is stored in unary: one 1 per number, preceded by as many 0s as the upper part has grown. This takes low + 2
to low + 3 bits per number, about half a bit above the entropy of a random ascending list. Both parts are decoded by
array operations, without a loop.

Source: Elias 1974 (J. ACM 21:2) and Fano 1971; known as the Elias-Fano code.
"""

from __future__ import annotations

import numpy as np


def pack_sorted(values: np.ndarray, universe: int) -> np.ndarray:
    """Encode ascending numbers. Returns uint8 [bytes].

    Args:
        values: int64 [count], each larger than the one before it and below ``universe``.
        universe: at most 2**24 times the count.
    """
    count = len(values)
    low = _low_bits(universe, count)
    upper = np.zeros(count + (universe >> low) + 1, np.uint8)
    upper[(values >> low) + np.arange(count)] = 1
    lower = values[:, None] >> np.arange(low) & 1
    return np.concatenate([_packed(upper), _packed(lower.astype(np.uint8).ravel())])


def unpack_sorted(data: np.ndarray, count: int, universe: int) -> np.ndarray:
    """Decode the numbers that :func:`pack_sorted` was given. int64 [count]

    Args:
        data: uint8, their bytes; trailing bytes are ignored.
        count: number of values.
        universe: same value as in :func:`pack_sorted`.

    Raises:
        ValueError: the bytes do not encode such numbers.
    """
    low = _low_bits(universe, count)
    length = count + (universe >> low) + 1
    split = -(-length // 8)
    ones = np.flatnonzero(np.unpackbits(data[:split], count=length, bitorder="little").view(bool))
    stop = split + -(-count * low // 8)
    if len(ones) != count or len(data) < stop:
        raise ValueError(f"{len(data)} bytes with {len(ones)} numbers, expected {stop} bytes with {count}")
    upper = ones - np.arange(count)
    if low == 0:
        return _rising(upper)
    words = np.ndarray(stop - split, "<u4", np.append(data[split:stop], np.zeros(3, np.uint8)), strides=(1,))
    at = np.arange(count) * low
    return _rising(upper << low | words[at >> 3] >> (at & 7).astype(np.uint32) & np.uint32((1 << low) - 1))


def num_bytes(count: int, universe: int) -> int:
    """Number of bytes of :func:`pack_sorted` for ``count`` numbers."""
    low = _low_bits(universe, count)
    return -(-(count + (universe >> low) + 1) // 8) + -(-count * low // 8)


def _rising(values: np.ndarray) -> np.ndarray:
    if (np.diff(values) <= 0).any():
        raise ValueError("numbers that do not rise")
    return values


def _low_bits(universe: int, count: int) -> int:
    return max(0, (universe // max(count, 1)).bit_length() - 1)


def _packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, bitorder="little")
