"""Train, load and compare tokenizers. Every tokenizer of the project is a plain Hugging Face folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distill.core.artifact import hash_of, replacing
from distill.core.errors import DistillError, InputError
from distill.core.stop import stoppable
from distill.data.first_tokens import around
from distill.pretrained import tokenizer_from

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
_MERGES_PROBE = "Naïve café, 12 345.67 €\n\tdef f(x):  return x**2  # 東京 — don't\r\n"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: Path, max_bytes: int = 200_000_000
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al., 2016, arXiv:1508.07909; bytes as in GPT-2) and save it.

    It can encode any text, and decoding returns the text byte for byte. The same texts give the same tokenizer.

    Args:
        texts: the texts from which the merges are learned.
        vocab_size: maximum number of tokens: 256 bytes, ``<|endoftext|>`` (begin and end), ``<|pad|>`` and merges.
        folder: where it is saved; an existing folder is replaced.
        max_bytes: amount of text after which reading stops; more changes the merges little and costs memory.

    Raises:
        InputError: no text at all, or a vocabulary too small for the bytes.
        MachineError: the folder cannot be written.
    """
    special, alphabet = [END_OF_TEXT, PAD], sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(special) + len(alphabet):
        raise InputError(f"tokenizer: vocab_size ({vocab_size}) must be at least {len(special) + len(alphabet)}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    limited = _Limited(texts, max_bytes)
    backend.train_from_iterator(limited, trainer)
    if not limited.num_bytes:
        raise InputError("tokenizer: there is no text to train it on")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    with replacing(folder) as temporary:
        tokenizer.save_pretrained(temporary)
    return tokenizer


class _Limited:
    """Texts, up to a number of bytes."""

    def __init__(self, texts: Iterable[str], max_bytes: int):
        self.texts, self.max_bytes, self.num_bytes = texts, max_bytes, 0

    def __iter__(self) -> Iterator[str]:
        for text in stoppable(self.texts):
            self.num_bytes += len(text.encode("utf-8"))
            yield from _without_endless_words(text)
            if self.num_bytes >= self.max_bytes:
                return


_ENDLESS = re.compile(r"\S{1000}|\s{1000}")
_MOST_ENDLESS = 100


def _without_endless_words(text: str) -> Iterator[str]:
    """Split after each run of 1,000 characters that are all whitespace or all not; yield only the first 100 of these
    runs.

    The time to learn merges from a word grows with the square of its length, and there is little in it to learn.
    """
    start, left = 0, _MOST_ENDLESS
    for found in _ENDLESS.finditer(text):
        end = found.end() if left else found.start()
        if end > start:
            yield text[start:end]
        start, left = found.end(), max(0, left - 1)
    yield text[start:]


def load_tokenizer(location: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder or the Hub; code that comes with it is never run.

    Raises:
        InputError: it does not exist, has no fast version, or has no end-of-text token.
    """
    tokenizer = tokenizer_from(str(location))
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"{location}: this tokenizer ({type(tokenizer).__name__}) has no fast version (tokenizer.json)"
        )
    if tokenizer.eos_token_id is None and tokenizer.cls_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # the end of a text of an encoder
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{location}: this tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def check_same_vocabulary(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> None:
    """Check that token ids mean the same for a student and its teacher.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.

    Raises:
        InputError: the vocabularies or the ways to split text differ.
    """
    ours, theirs = (
        {index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (student, teacher)
    )
    if ours != theirs:
        first = next(i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i))
        raise InputError(
            f"vocabulary: student has {len(ours)} tokens, teacher {len(theirs)}; the first that differs is {first}: "
            f"{ours.get(first)!r} for the student, {theirs.get(first)!r} for the teacher; use models of one tokenizer"
        )
    ways = [tokenizer(_MERGES_PROBE, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)]
    if ways[0] != ways[1]:
        raise InputError(
            "vocabulary: student and teacher have the same tokens but cut text differently; use one tokenizer"
        )
    around = [_around(tokenizer) for tokenizer in (student, teacher)]
    if around[0] != around[1]:
        raise InputError(
            "vocabulary: student and teacher have the same tokens, but around a text the student's tokenizer puts "
            f"{around[0]} and the teacher's {around[1]}; use one tokenizer, or give both one post_processor"
        )


def _around(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokens that a tokenizer puts before and after a text, for messages to the user."""
    ends = [tokenizer.convert_ids_to_tokens(ids) for ids in around(tokenizer)]
    return " and ".join(repr(token) for tokens in ends for token in tokens) or "nothing"


def check_read_back(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    """Check that transformers would load this tokenizer unchanged with an architecture.

    For some architectures (Qwen2) transformers ignores ``tokenizer_config.json`` and splits text by the architecture's
    own rules, whatever the vocabulary.

    Args:
        tokenizer: the one that will be saved with the model.
        model_type: key of the model's config.

    Raises:
        InputError: the loaded tokenizer would encode text differently.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        again = load_tokenizer(folder)
    if _difference(tokenizer, again):
        raise InputError(
            f"config.model_type: transformers reads the tokenizer of any {model_type} model as a "
            f"{type(again).__name__}, which cuts text otherwise than the run's; set data.tokenizer to one made for "
            f"{model_type}, or take another architecture"
        )


def check_written(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that a tokenizer is unchanged when it is loaded from the model folder in which it was saved.

    Raises:
        DistillError: it does not load, or differs.
    """
    try:
        again = load_tokenizer(folder)
    except InputError as error:
        raise DistillError(f"{error}, right after it was written") from error
    if other := _difference(tokenizer, again):
        raise DistillError(
            f"{folder}: the tokenizer that was written is read back with another {other}; set data.tokenizer to one "
            "that was made for this architecture"
        )


def _difference(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> str | None:
    """What differs between two tokenizers, for messages to the user; None if no difference is found."""
    text = (_MERGES_PROBE, f" {_MERGES_PROBE}")
    if one.get_vocab() != other.get_vocab():
        return "vocabulary"
    if one(text)["input_ids"] != other(text)["input_ids"]:
        return "way to cut text"
    return None if one.eos_token_id == other.eos_token_id else "end-of-text token"


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything that decides how text becomes ids."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # set by callers, undone before we encode
    return hash_of(backend, tokenizer.eos_token_id)
