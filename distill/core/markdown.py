"""Text from outside as Markdown shows it: letter by letter, whatever it holds.

A licence, a path or an answer may hold tags, links or tables of its own, which whoever shows a report would render.
"""

from __future__ import annotations

import re

_MARKS = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<!\S)#")
_BLOCK = re.compile(r"^(\d*)([.)+-](?: |$)|-(?=[- ]*$))")
_TAGS = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escaped(text: object) -> str:
    """One line of Markdown that reads as the text does: no tag, link, emphasis, cell or block of its own."""
    line = _MARKS.sub(r"\\\g<0>", without_tags(str(text)))
    return _BLOCK.sub(r"\1\\\2", line)


def without_tags(text: str) -> str:
    """One line whose Markdown is meant, such as code in it, and that has no HTML."""
    return "".join(_TAGS.get(letter, letter) for letter in " ".join(text.split()))


def fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
