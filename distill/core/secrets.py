"""Keeps tokens, keys and passwords out of what people read and what a run writes down."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"
IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
"""What stands before the host of a URL: a user's name and password, or a token."""
IN_QUERY = re.compile(
    r"(?<=[?&])((?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId|sig|"
    r"(?:access[_-]?)?token|api[_-]?key|key|password)=)[^&\s'\"]+",
    re.IGNORECASE,
)
"""What a signed URL holds in its query, and who has it may read the file."""
NAMES = re.compile(r"(TOKEN|KEY|PASSWORD|PASSWD|SECRET)S?$", re.IGNORECASE)
"""Environment variables whose values are nobody's business."""
SHORTEST = 8


def redacted(text: str) -> str:
    """A text without the credentials of URLs in it and without the secrets of this process' environment."""
    text = IN_QUERY.sub(rf"\1{HIDDEN}", IN_URL.sub(HIDDEN, text))
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and NAMES.search(name):
            text = text.replace(value, HIDDEN)
    return text


def secrets_in(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where in plain data a text holds what :func:`redacted` would hide."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from secrets_in(value, (*path, key))
    if isinstance(data, str) and redacted(data) != data:
        yield path
