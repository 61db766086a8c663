"""Limits of how much of a stream is on disk; see :mod:`distill.data.stream_shards`."""

SMALLEST, LARGEST = 1 << 16, 1 << 22
"""Shard size in tokens: equal to the number of tokens before it (sizes double), clamped to these bounds."""
AHEAD, BEHIND = 4, 1
"""Number of shards whose rows are kept after and before a reader's current shard."""
TOKEN_BYTES = 8
"""Bytes per token on disk: its id, and its position in its document."""
MOST_BYTES = (BEHIND + 1 + AHEAD + 1) * LARGEST * TOKEN_BYTES
"""Largest number of bytes of rows on disk, including the shard that is being written, if all processes read at about
the same position."""
