"""About how much text a recipe has, by a look at its first rows, and how often a training reads it.

Nothing is downloaded, and a stream is left alone; neither torch nor transformers is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer

from distill.core.errors import InputError
from distill.data.base import SourceSpec
from distill.data.mixture import Mixture
from distill.data.spec import DataSpec
from distill.data.stream_bounds import MOST_BYTES
from distill.forecast.look import LOOK_BYTES, PIECE, Look, pieces_of, tokenizer_of
from distill.forecast.memory_limit import amount
from distill.forecast.tokenizing import LONG_BYTES, Rates, about_tokenizing, bytes_per_id, rates_of
from distill.recipe import Recipe

BYTES_PER_TOKEN = 4.0
"""Of English in a vocabulary of 32,000 to 150,000 tokens; where there is no tokenizer to count with."""
FEW_PREDICTIONS = 2000
"""Below it the mean loss of one model has a standard error above 0.05 nats, as a token's loss has one of about 2.5."""
OFTEN = 4
"""Passes up to which repeated text is nearly as good as new text (arXiv 2305.16264)."""


@dataclass(frozen=True)
class TextForecast:
    """How many tokens there are, as far as the first rows say.

    Attributes:
        train: tokens to train on; None where only reading all of the text would say.
        validation: tokens to validate on, of which the recipe may use fewer.
        bytes_per_token: of UTF-8.
        measured_with: whose tokenizer counted the first rows; None: :data:`BYTES_PER_TOKEN` is assumed.
        is_counted: whether all of the text was read, not its first rows alone.
        unusable: a line for each source with rows that cannot be used.
        sources: of a mixture, the tokens to train on of each.
        bytes_per_id: of a token in the token files.
        rates: at which this machine tokenizes it; None where that is not measured, as for a text that is short.
    """

    train: float | None
    validation: float | None
    bytes_per_token: float = BYTES_PER_TOKEN
    measured_with: str | None = None
    is_counted: bool = False
    unusable: tuple[str, ...] = ()
    sources: Mapping[str, float | None] = field(default_factory=dict)
    bytes_per_id: int = 4
    rates: Rates | None = None

    @property
    def disk_bytes(self) -> float:
        """Of the token files; a mixture has those of its sources beside the joined ones."""
        tokens = (self.train or 0.0) + (self.validation or 0.0)
        return tokens * self.bytes_per_id * (2 if self.sources else 1)


def text_of(recipe: Recipe, looks: Mapping[str, Look | None]) -> TextForecast:
    """How much text a recipe has.

    Args:
        recipe: whose text it is.
        looks: key of each source -> its first rows.

    Raises:
        InputError: no row that was looked at can be used, or the tokenizer cannot be read.
    """
    data = recipe.data
    known = [look for look in looks.values() if look is not None]
    total = sum(source.num_bytes() or 0 for key, source in data.sources() if looks[key] is not None)
    texts = [text for look in known for text in look.texts]
    measured = _measured(recipe, texts, total >= LONG_BYTES)
    per_token = measured.bytes_per_token
    tokens = {key: _tokens(source, looks[key], per_token) for key, source in data.sources()}
    is_counted = len(known) == len(looks) and all(look.is_all for look in known)
    is_counted = is_counted and all(len(text) <= PIECE for text in texts) and sum(map(len, texts)) <= LOOK_BYTES
    unusable = tuple(line for key, look in looks.items() if look and (line := _unusable(key, look, data)))
    if not isinstance(data.train, Mixture):
        sides_of_one = _sides(data, tokens, "data.train", "data.validation", data.train)
        return replace(
            measured, train=sides_of_one[0], validation=sides_of_one[1], is_counted=is_counted, unusable=unusable
        )
    sides = {
        name: _sides(data, tokens, f"data.train.sources.{name}", f"data.train.validation.{name}", source)
        for name, source in data.train.sources.items()
    }
    train, held_out = (_sum([side[number] for side in sides.values()]) for number in (0, 1))
    sources = {name: side[0] for name, side in sides.items()}
    return replace(
        measured, train=train, validation=held_out, is_counted=is_counted, unusable=unusable, sources=sources
    )


def _sides(
    data: DataSpec, tokens: dict[str, float | None], train: str, validation: str, source: SourceSpec
) -> tuple[float | None, float | None]:
    """Tokens to train on and to validate on of one source, by its keys and that of its validation source."""
    is_copied = data.augment is not None and not source.holds_conversations()
    times = 1 + data.augment.replace_words.copies if data.augment is not None and is_copied else 1
    whole = tokens[train]
    if validation in tokens:
        return None if whole is None else times * whole, tokens[validation]
    return (None, None) if whole is None else (times * (1 - data.held_out) * whole, data.held_out * whole)


def _sum(numbers: Sequence[float | None]) -> float | None:
    return None if None in numbers else sum(number or 0 for number in numbers)


def lines(text: TextForecast, data: DataSpec, num_machines: int = 1) -> Iterator[str]:
    """The same in words, and whether it is enough to validate on.

    Args:
        text: of a recipe.
        data: its section.
        num_machines: that tokenize it.
    """
    yield from text.unusable
    if data.train.is_stream():
        yield (
            "a stream: tokenized by one process while a training reads it, a little ahead; at most about "
            f"{amount(MOST_BYTES)} of its rows are in the run's data folder at once"
        )
    if text.train is None:
        yield "how many tokens it has is known when it is read"
        return
    how = f"{text.bytes_per_token:.2f} bytes per token"
    how += f" by the tokenizer of {text.measured_with}" if text.measured_with else " assumed"
    about = "" if text.is_counted and text.measured_with else "about "
    unknown = "unknown" if text.validation is None else f"{about}{_rounded(text.validation)}"
    yield f"{about}{_rounded(text.train)} tokens to train on, {unknown} held out to validate on ({how})"
    if data.augment is not None:
        spec = data.augment.replace_words
        each = "a copy" if spec.copies == 1 else f"{spec.copies} copies"
        yield f"among them {each} of each document, with {spec.probability:.0%} of the words replaced (data.augment)"
    yield from about_tokenizing(text.train + (text.validation or 0), text.bytes_per_token, text.rates, num_machines)
    few = text.validation is not None and min(text.validation, data.validation_tokens) < FEW_PREDICTIONS
    if text.validation is not None and few and data.task.is_causal:  # other tasks predict fewer things than tokens
        more = "data.held_out" if data.validation is None else "data.validation"
        if text.validation >= FEW_PREDICTIONS:
            more = "data.validation_tokens"
        yield (
            f"validates on about {_rounded(min(text.validation, data.validation_tokens))} predictions, too few to tell "
            f"models apart that differ by less than 0.1 nats; give more by {more}"
        )


def passes(num_tokens: float, text: TextForecast) -> str | None:
    """How often a training of so many tokens reads the text, in words; None when it does not come to its end."""
    if not text.train or num_tokens <= 1.5 * text.train:
        return None
    times = num_tokens / text.train
    if times <= OFTEN:
        return f"each token of the text is read about {times:.1f} times"
    return (
        f"each token of the text is read about {times:,.0f} times; beyond {OFTEN} a further pass brings less and less: "
        "give more text, or a smaller budget"
    )


def _unusable(what: str, look: Look, data: DataSpec) -> str | None:
    """What is wrong with rows that were looked at, in words; of conversations :mod:`distill.forecast.chat` says it."""
    tally = look.tally
    if data.holds_conversations or not tally.num_dropped:
        return None
    if tally.num_dropped == tally.num_read or (look.is_all and tally.num_dropped > data.max_dropped * tally.num_read):
        tally.check(what, data.max_dropped)
    line = f"{what}: {tally.num_dropped:,} of the first {tally.num_read:,} rows cannot be used: {tally.reasons()}"
    if tally.num_dropped > data.max_dropped * tally.num_read:
        line += f"; the run stops if more than {data.max_dropped:.1%} of all rows are like them (data.max_dropped)"
    return line


def _tokens(source: SourceSpec, look: Look | None, per_token: float) -> float | None:
    if source.holds_ids():
        return look.num_ids if look is not None and look.is_all else None
    num_bytes = look.num_bytes if look is not None and look.is_all else None
    if num_bytes is None and look is not None:
        num_bytes = source.num_bytes()
    return None if num_bytes is None else num_bytes / per_token


def _measured(recipe: Recipe, texts: list[str], is_long: bool) -> TextForecast:
    """What the run's tokenizer makes of the texts, where it is on this machine, and how fast it is on a long text.

    Raises:
        InputError: its file is no tokenizer.
    """
    found = tokenizer_of(recipe)
    if found is None or not texts:
        return TextForecast(None, None)
    named, file = found
    sample = pieces_of(texts, LOOK_BYTES)
    try:
        backend = Tokenizer.from_file(str(file))
        backend.no_padding()  # a file may hold the settings of some program, such as rows of 128 tokens
        backend.no_truncation()
        num_tokens = sum(len(one) for one in backend.encode_batch_fast(sample, add_special_tokens=False))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{file}: not a tokenizer ({error}); fetch it again") from None
    return TextForecast(
        None,
        None,
        bytes_per_token=sum(len(piece.encode("utf-8")) for piece in sample) / max(num_tokens, 1),
        measured_with=named,
        bytes_per_id=bytes_per_id(backend),
        rates=rates_of(backend, texts) if is_long else None,
    )


def _rounded(number: float) -> str:
    """Two digits; more would be guessed."""
    digits = max(0, len(str(int(number))) - 2)
    return f"{round(number / 10**digits) * 10**digits:,}"
