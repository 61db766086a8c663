"""What is read of a model or tokenizer folder, and what is refused before any library reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from distill.core.errors import InputError
from distill.core.model_config import read_config
from distill.core.outside import LARGEST_TEXT, opened, status_of, unreadable

WEIGHTS = ".safetensors"
CONTENT = {".json", WEIGHTS, ".model", ".txt", ".jinja"}
"""Suffixes of what a model or tokenizer consists of."""
FILES = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
    *("spiece.model", "spm.model", "sentencepiece.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json"),
}
"""Names of what a folder holds of a model and its tokenizer besides the weights."""
ADAPTER = "adapter_config.json"
LARGEST_HEADER = 100_000_000
"""Bytes, as in the library of safetensors."""


def content_files(folder: Path) -> list[Path]:
    """The regular files of a folder that may belong to a model or tokenizer, by name.

    Hidden files and folders do not count, nor do texts that are too large for it and have other names than its files.

    Raises:
        InputError: the folder cannot be listed, or an entry with such a name is too large, a pipe, a device, or a link
            that leads nowhere.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from None
    found = []
    for file in (folder / name for name in names if not name.startswith(".")):
        if file.suffix not in CONTENT or file.is_dir():
            continue
        size = status_of(file).st_size
        if file.suffix == WEIGHTS or size <= LARGEST_TEXT:
            found.append(file)
        elif file.name in FILES:
            raise InputError(
                f"{file}: has {size >> 20:,} MiB, expected at most {LARGEST_TEXT >> 20}, which is twice what "
                "the largest tokenizers have; fetch or make it anew"
            )
    return found


def check_folder(folder: Path) -> list[Path]:
    """The files of :func:`content_files`, whose configs and headers of weights are what they can be.

    Raises:
        InputError: they are not; see also :func:`content_files`.
    """
    files = content_files(folder)
    for file in files:
        if file.name in ("config.json", "generation_config.json"):
            read_config(file)
        elif file.suffix == WEIGHTS:
            check_length(file)
    return files


def check_no_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter in it: transformers loads it beside the weights, and then saves it alone.

    Raises:
        InputError: there is one.
    """
    if (folder / ADAPTER).is_file():
        raise with_adapter(str(folder))


def with_adapter(location: str) -> InputError:
    """What to raise for a model that comes with an adapter."""
    return InputError(
        f"{location}: holds an adapter ({ADAPTER}); merge it into the weights by peft, "
        f"AutoPeftModelForCausalLM.from_pretrained({location!r}).merge_and_unload().save_pretrained(FOLDER), and name "
        f"that folder, or remove {ADAPTER} to use the weights without it"
    )


def check_length(file: Path) -> None:
    """Refuse a safetensors file that is longer or shorter than its header says, such as half a download.

    Raises:
        InputError: it is.
    """
    with opened(file) as stream:
        length, size = int.from_bytes(stream.read(8), "little"), os.fstat(stream.fileno()).st_size
        header = stream.read(length) if length <= min(LARGEST_HEADER, size) else b""
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise InputError(f"{file}: begins with no whole header of safetensors; download or copy it again") from None
    if size != expected:
        raise InputError(
            f"{file}: has {size:,} bytes, expected {expected:,} by its own header; download or copy it again"
        )
