"""Train, load and compare tokenizers. Every tokenizer of the project is a plain Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from distill.core.artifact import replacing
from distill.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
_MERGES_PROBE = "Naïve café, 12 345.67 €\n\tdef f(x):  return x**2  # 東京 — don't\r\n"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: Path, max_bytes: int = 200_000_000
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al., 2016, arXiv:1508.07909; bytes as in GPT-2) and save it.

    Any text can be written in it and comes back byte for byte. The same texts give the same tokenizer.

    Args:
        texts: what to learn the merges from.
        vocab_size: tokens at most: 256 bytes, ``<|endoftext|>`` (begin and end), ``<|pad|>`` and merges.
        folder: replaced as a whole.
        max_bytes: stop reading after so much text; more changes the merges little and costs memory.

    Raises:
        InputError: no text at all, or a vocabulary too small for the bytes.
        MachineError: the folder cannot be written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    """Texts until so many bytes have gone by."""

    def __init__(self, texts: Iterable[str], max_bytes: int):
        self.texts, self.max_bytes, self.num_bytes = texts, max_bytes, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.num_bytes += len(text.encode("utf-8"))
            yield text
            if self.num_bytes >= self.max_bytes:
                return


def load_tokenizer(location: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder or the Hub; code that comes with it is never run.

    Raises:
        InputError: it is not there, has no fast version, or marks no end of text.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(location), trust_remote_code=False)
    except Exception as error:  # the library's errors are of many kinds and many lines
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{location}: the tokenizer cannot be loaded ({why})") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"{location}: this tokenizer ({type(tokenizer).__name__}) has no fast version (tokenizer.json)"
        )
    if tokenizer.eos_token_id is None and tokenizer.cls_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # what ends a text for an encoder
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{location}: this tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def check_same_vocabulary(
    student: PreTrainedTokenizerFast,
    teacher: PreTrainedTokenizerFast,
    student_vocabulary_size: int | None = None,
    teacher_vocabulary_size: int | None = None,
) -> None:
    """Refuse a student and a teacher that mean different things by the same token id.

    The heads of the models may be larger than the vocabulary, and differently so, as rows are often padded.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.
        student_vocabulary_size: rows of the student's head; None leaves that check out.
        teacher_vocabulary_size: rows of the teacher's head; None leaves that check out.

    Raises:
        InputError: the vocabularies or the ways to cut text differ, or a head has too few rows.
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
    if student(_MERGES_PROBE)["input_ids"] != teacher(_MERGES_PROBE)["input_ids"]:
        raise InputError(
            "vocabulary: student and teacher have the same tokens but cut text differently; use one tokenizer"
        )
    for who, size in (("student", student_vocabulary_size), ("teacher", teacher_vocabulary_size)):
        if size is not None and size <= max(ours):
            raise InputError(f"vocabulary: the {who}'s head has {size} rows, its tokenizer needs {max(ours) + 1}")


def check_read_back(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    """Refuse a new model beside which this tokenizer would be read as another one.

    For some architectures (Qwen2) transformers passes over what ``tokenizer_config.json`` says and reads every
    vocabulary with the architecture's own rules for cutting text.

    Args:
        tokenizer: what is to be saved with the model.
        model_type: of the model's config.

    Raises:
        InputError: text would be cut otherwise.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        again = load_tokenizer(folder)
    text = (_MERGES_PROBE, f" {_MERGES_PROBE}")
    if again.get_vocab() != tokenizer.get_vocab() or again(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise InputError(
            f"config.model_type: transformers reads the tokenizer of any {model_type} model as a "
            f"{type(again).__name__}, which cuts text otherwise than the run's; set data.tokenizer to one made for "
            f"{model_type}, or take another architecture"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of all that decides how text becomes ids."""
    from distill.core.artifact import hash_of

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # set by callers, undone before we encode
    return hash_of(backend, tokenizer.eos_token_id)
