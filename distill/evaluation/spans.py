"""Spans of words with one class, such as names of several words, from classes in the IOB2 scheme.

    B-PER I-PER O B-LOC      ->   (PER, words 0 to 1), (LOC, word 3)

An ``I-`` that follows nothing of its class begins a span, as in the evaluation of CoNLL-2003.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def spans_of(classes: Sequence[str]) -> set[tuple[str, int, int]]:
    """(class, first word, last word) of each span of a row.

    Args:
        classes: of the words of the row.
    """
    found, start, kind = set(), 0, ""
    for at, name in enumerate([*classes, "O"]):
        prefix, _, rest = name.partition("-")
        goes_on = prefix == "I" and rest == kind
        if kind and not goes_on:
            found.add((kind, start, at - 1))
            kind = ""
        if prefix in ("B", "I") and not goes_on:
            start, kind = at, rest
    return found


def span_counts(answers: Tensor, targets: Tensor, rows: Tensor, classes: Sequence[str]) -> Tensor | None:
    """(right, predicted, wanted) spans of each row, int64 [rows, 3]; None where the classes mark no spans.

    Args:
        answers: predicted classes of the words, int64 [words].
        targets: their classes, int64 [words].
        rows: row of each word, rising. [words]
        classes: names of the classes.
    """
    if not any(name.startswith(("B-", "I-")) for name in classes):
        return None
    _, sizes = torch.unique_consecutive(rows, return_counts=True)
    counts = []
    for one, other in zip(answers.split(sizes.tolist()), targets.split(sizes.tolist()), strict=True):
        predicted, wanted = (spans_of([classes[int(at)] for at in part]) for part in (one, other))
        counts.append([len(predicted & wanted), len(predicted), len(wanted)])
    return torch.tensor(counts)
