"""The licence in a model card. A card is untrusted text, so only its lines about the licence are parsed."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import yaml

from distill.core.outside import is_folder

MOST_BYTES = 1 << 22
"""Bytes of a card that are read; its metadata are at the beginning."""
MOST_CHARACTERS, LONGEST = 1_000, 200
"""Limits on the text of the key with its value, and on the licence."""
FENCE = "---"
KEY = re.compile(r"""["']?license["']?\s*:(\s|$)""")


def licence_of(location: str, say: Callable[[str], None] = lambda line: None) -> str | None:
    """The licence in the metadata of a model's README.md (``license:``), in its folder or on the Hub.

    Args:
        location: folder or Hub id.
        say: called with one line of text if the licence of a card cannot be read.

    Returns:
        None if there is no card, it states no licence, or the licence cannot be read.
    """
    card = Path(location) / "README.md"
    if not is_folder(location):
        from huggingface_hub import hf_hub_download

        try:
            card = Path(hf_hub_download(location, "README.md"))
        except Exception:  # offline, no card, no such model: whatever the reason, the licence is not known
            return None
    try:
        if not card.is_file():
            return None
        with card.open("rb") as stream:
            return _licence(_metadata(stream.read(MOST_BYTES).decode("utf-8-sig", errors="surrogateescape")))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        say(f"{card}: the licence cannot be read ({why}); the exported card will say that it is unknown")
        return None


def _metadata(text: str) -> list[str]:
    """The lines of the YAML front matter, between two lines ``---`` at the beginning; [] if there is none.

    Raises:
        ValueError: there is no second ``---``.
    """
    first, *lines = text.splitlines() or [""]
    if first.rstrip() != FENCE:
        return []
    for number, line in enumerate(lines):
        if line.rstrip() == FENCE:
            return lines[:number]
    raise ValueError(f"its metadata do not end: expected a second line {FENCE}")


def _licence(metadata: list[str]) -> str | None:
    """The value of the top-level key ``license``: a name or a list of names.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: the value is something else.
    """
    at = next((number for number in reversed(range(len(metadata))) if KEY.match(metadata[number])), None)
    if at is None:
        return None
    more = takewhile(lambda line: not line.strip() or line.startswith((" ", "\t", "- ")), metadata[at + 1 :])
    written = "\n".join([metadata[at], *more]).strip()
    if len(written) > MOST_CHARACTERS:
        raise ValueError(f"expected at most {LONGEST} printable characters")
    node = yaml.compose(written, Loader=yaml.SafeLoader)  # only nodes: no YAML tag constructs an object
    assert isinstance(node, yaml.MappingNode)
    _, stated = node.value[0]
    if stated.tag == "tag:yaml.org,2002:null":
        return None
    parts = stated.value if isinstance(stated, yaml.SequenceNode) else [stated]
    if not all(isinstance(part, yaml.ScalarNode) for part in parts):
        raise ValueError("expected a name or a list of names")
    licence = " ".join(", ".join(part.value for part in parts).split())
    if len(licence) > LONGEST or not licence.isprintable():
        raise ValueError(f"expected at most {LONGEST} printable characters")
    return licence or None
