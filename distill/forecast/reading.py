"""What a model will read of plain text: what rows begin with, and texts that look like something else.

Neither torch nor transformers is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distill.core.outside import read_json
from distill.data.base import Document
from distill.data.first_tokens import described, written_start
from distill.data.tally import Tally
from distill.data.written_out import WrittenOut
from distill.forecast.look import Look, tokenizer_of
from distill.recipe import Recipe


def about_reading(recipe: Recipe, looks: Mapping[str, Look | None]) -> Iterator[str]:
    """A line for each thing to know of the recipe's rows and documents.

    Args:
        recipe: whose text it is.
        looks: key of each source -> its first rows.
    """
    found = tokenizer_of(recipe)
    backend = None if found is None else read_json(found[1])
    if backend is not None and (start := written_start(backend)) is not None:
        yield described(start)
    special = WrittenOut.written(backend or {})
    for key, source in recipe.data.sources():
        one = looks[key]
        if one is not None and source.paths():  # text that comes with Python is none of the user's
            yield from _documents(key, one, special)


def _documents(what: str, look: Look, special: WrittenOut) -> Iterator[str]:
    """What documents hold that is no plain text elsewhere."""
    tally = Tally()
    for item in look.items:
        if isinstance(item, Document):
            tally.note(special.noted(item.text), item.id)
    for line in tally.lines(what):
        yield f"{line}; looked at the first {tally.num_read:,}"
