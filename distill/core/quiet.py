"""What torchao says as it is imported, which transformers does wherever it is installed; users cannot fix it."""

from __future__ import annotations

import logging
from functools import partial

NOTICES = {
    "torch.utils._pytree": "is an Enum subclass and is now natively supported by torch.compile",
    "torchao": "Failed to load ",  # kernels for GPUs that are not here
}
"""Logger -> what marks a line of it that is not shown."""


def _is_other(mark: str, record: logging.LogRecord) -> bool:
    return mark not in record.getMessage()


_FILTERS = {name: partial(_is_other, mark) for name, mark in NOTICES.items()}


def quiet_torchao() -> None:
    """Keep these lines, and no others, out of people's way. Loads neither library; once or often is the same."""
    for name, keep in _FILTERS.items():
        logging.getLogger(name).addFilter(keep)
