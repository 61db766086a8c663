"""How much of a stream is on disk; see :mod:`distill.data.stream_shards`."""

SMALLEST, LARGEST = 1 << 16, 1 << 22
"""Tokens of a shard: as many as stand before it, within these bounds."""
AHEAD, BEHIND = 4, 1
"""Shards of rows that are kept for a reader after and before the one that it reads."""
TOKEN_BYTES = 8
"""Of a token on disk: its id, and its position in its document."""
MOST_BYTES = (BEHIND + 1 + AHEAD + 1) * LARGEST * TOKEN_BYTES
"""Of rows on disk at once, for processes that read at about one place, with the shard that is being written."""
