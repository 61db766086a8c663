"""What can be said of conversations before a run: their form, what cannot be used, and the chat template.

Rows are read as far as a look takes no time; neither torch nor transformers is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from distill.core.errors import InputError
from distill.data.base import Rejected
from distill.data.chat import Chat
from distill.data.chat_spec import ChatSpec, Text, read_template
from distill.data.conversation import dialect_of
from distill.data.tally import Tally
from distill.models.load import locate
from distill.recipe import Recipe
from distill.stages.chat import first_student

LOOKED_AT = 500
"""Rows of each source."""


def about_chat(recipe: Recipe) -> Iterator[str]:
    """A line for each thing to know of the recipe's conversations.

    Raises:
        InputError: no row that was looked at can be used, or the model that the recipe names has no chat template.
    """
    if not recipe.data.holds_conversations:
        return
    for key, source in recipe.data.sources():
        if isinstance(source, Chat) and source.hub is None and not source.is_remote():
            yield _rows(key, source, recipe.data.max_dropped)
    yield from _template(recipe)


def _rows(what: str, source: Chat, most: float) -> str:
    """What the first rows of a source are."""
    tally, forms = Tally(), Counter[str]()
    for id, row in islice(source.rows(), LOOKED_AT):
        if isinstance(item := source.read(id, row), Rejected):
            tally.drop(item)
        else:
            tally.note({})
            forms[dialect_of(row, source.columns())] += 1
    if tally.num_dropped == tally.num_read:
        tally.check(what, 0.0)
    line = f"{what}: {', '.join(f'{count:,} rows of {form}' for form, count in forms.items())}"
    if tally.num_read == LOOKED_AT:
        line += f" among the first {LOOKED_AT:,}"
    if tally.num_dropped:
        line += f"; {tally.num_dropped:,} cannot be used: {tally.reasons()}"
        if tally.num_dropped > most * tally.num_read:
            line += f"; as the rest is read the run stops if more than {most:.1%} are like them (data.max_dropped)"
    return line


def _template(recipe: Recipe) -> Iterator[str]:
    chat = recipe.data.chat or ChatSpec()
    text, whose = _found(recipe, chat)
    if text is None:
        yield f"chat template: {whose}, which is read when the run starts"
        return
    whole = text if isinstance(text, str) else "\n".join(text.values())
    yield f"chat template: {whose}, {len(whole):,} characters, learned from: {chat.learn_from}"
    if "strftime_now" in whole and chat.today is None and not chat.arguments:
        yield "chat template: it speaks of today's date (strftime_now); where it writes it, data.chat.today is needed"


def _found(recipe: Recipe, chat: ChatSpec) -> tuple[Text | None, str]:
    """The template, None where its model is not on this machine; and whose it is, in words.

    Raises:
        InputError: there is none.
    """
    if (written := chat.written()) is not None:
        return written, "that of the recipe" if written == chat.template else chat.template
    reference = "teacher" if chat.template == "teacher" else first_student(recipe.stages)
    named = recipe.teacher if reference == "teacher" else reference
    assert named is not None  # the recipe would have been refused
    location = Path(locate(named))
    if not location.is_dir():
        return None, f"that of {named}"
    if (text := read_template(location)) is None:
        raise InputError(f"data.chat.template: {named} has no chat template; name a .jinja file")
    return text, f"that of {named}"
