"""Describes the text of a run for the user, before the run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distill.data.packed_rows import PackedRows
from distill.data.packing import TokenFile
from distill.data.spec import FULL
from distill.data.stream import Stream


def described(train: PackedRows | Stream) -> str:
    """Describe the training text in one line."""
    if isinstance(train, Stream):
        return f"train: a stream in rows of {train.sequence_length}"
    tokens = train.tokens
    what = f"{len(tokens.parts)} sources, {tokens.num_tokens:,} tokens" if tokens.parts else _text_of(tokens)
    line = f"train {what}, {len(train):,} rows of {train.sequence_length}"
    if train.packing not in FULL:
        line += f" at most, {train.lengths().mean():.0f} tokens of text in each"
    return line + ("" if tokens.parts else _repeated(tokens))


def lines_of_sources(train: PackedRows | Stream, validation: Mapping[str, PackedRows]) -> list[str]:
    """One line per source of a mixture; empty for any other text.

    Args:
        train: the training rows.
        validation: name of the source -> its validation rows.
    """
    if not validation or isinstance(train, Stream):
        return []
    parts, rows = train.tokens.parts, np.bincount(train.source_of_rows(), minlength=len(train.tokens.parts))
    whole, lines = sum(part.weight for part in parts), []
    for part, packed in zip(parts, rows, strict=True):
        held_out = validation[part.name]
        lines.append(
            f"  {part.name}: {part.weight / whole:.1%} of the tokens; {_text_of(part.tokens)}, {packed:,} rows"
            f"{_repeated(part.tokens)}; validation {len(held_out):,} rows, {held_out.num_predictions():,} predictions"
        )
    return lines


def _text_of(tokens: TokenFile) -> str:
    """Describe the token file of one source."""
    if tokens.num_learned is None:
        each = f" ({tokens.num_bytes / tokens.num_tokens:.2f} bytes each)" * bool(tokens.num_bytes)
        return f"{tokens.num_documents:,} documents, {tokens.num_tokens:,} tokens{each}"
    share = f"{tokens.num_tokens:,} tokens, {tokens.num_learned / tokens.num_tokens:.0%} of them learned from"
    conversations = tokens.tally.num_used
    if not conversations:  # texts of a mixture in which others are conversations
        return f"{tokens.num_documents:,} documents, {share}"
    rows = f" as {tokens.num_documents:,} documents" if conversations != tokens.num_documents else ""
    return f"{conversations:,} conversations{rows}, {share}"


def _repeated(tokens: TokenFile) -> str:
    if not tokens.num_repeated:
        return ""
    return f", {tokens.num_repeated:,} documents left out as validation has them, but for case and spaces"
