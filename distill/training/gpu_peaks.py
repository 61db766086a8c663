"""Dense 16-bit FLOP/s of GPUs by name, without torch, so that the forecast and the training read one table."""

from __future__ import annotations

import re

PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "A40": 150e12, "A10": 125e12, "T4": 65e12, "V100": 125e12, "4090": 165e12,
    "3090": 71e12, "A6000": 155e12,
}  # fmt: skip
"""Part of the name -> FLOP/s from NVIDIA's data sheets (of the SXM board, if there are several boards)."""


def peak_of(name: str) -> float | None:
    """FLOP/s of a GPU whose name contains a key of :data:`PEAKS` (the longest such key); None if it contains none.

    Args:
        name: as the driver reports it, such as ``NVIDIA H200``.
    """
    # match whole words (A1000 is not A100, T400 is not T4); for GB200 and GH200, strip the leading G
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    words |= {word[1:] for word in words if re.fullmatch(r"GB\d+|GH\d+", word)}
    known = max((part for part in PEAKS if part in words), key=len, default=None)
    return None if known is None else PEAKS[known]
