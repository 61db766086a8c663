"""Documents to token ids, once: a flat file of ids on disk that is memory-mapped ever after.

``<name>-<hash>.bin`` holds the ids of all documents end to end; ``.bytes`` beside it, for validation text only, how
many UTF-8 bytes each token stands for; ``.json`` is written last and says that both are whole.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from distill.core.artifact import read_json, sync, write_text
from distill.core.errors import InputError, MachineError
from distill.data.base import Document
from distill.data.encoder import Encoder
from distill.data.progress import Progress

if TYPE_CHECKING:
    import numpy as np

_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class TokenFile:
    """Token ids on disk.

    Attributes:
        path: the ``.bin`` file.
        dtype: ``uint16`` or ``uint32``.
        num_tokens: ids in it, begins and ends among them.
        num_documents: documents in it.
        num_bytes: UTF-8 bytes of their text.
        largest: the largest id.
        end: id that ends each document.
        num_repeated: documents left out as the validation source has them too.
    """

    path: str
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    largest: int
    end: int
    num_repeated: int = 0

    def ids(self) -> np.ndarray:
        """All ids, memory-mapped. [num_tokens]"""
        import numpy as np

        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.num_tokens,))

    def bytes_of_tokens(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, memory-mapped; validation text only. uint32 [num_tokens]"""
        import numpy as np

        return np.memmap(Path(self.path).with_suffix(".bytes"), dtype=np.uint32, mode="r", shape=(self.num_tokens,))


def read_tokens(path: Path) -> TokenFile | None:
    """The finished token file at ``path``, or None when there is none."""
    header = path.with_suffix(".json")
    if not (header.is_file() and path.is_file()):
        return None
    try:
        tokens = TypeAdapter(TokenFile).validate_python({**read_json(header), "path": str(path)})
    except (InputError, ValidationError):
        return None  # it is written anew
    width, beside = {"uint16": 2, "uint32": 4}.get(tokens.dtype), path.with_suffix(".bytes")
    whole = width is not None and path.stat().st_size == tokens.num_tokens * width
    return tokens if whole and (not beside.is_file() or beside.stat().st_size == tokens.num_tokens * 4) else None


def write_tokens(
    path: Path,
    documents: Iterable[Document],
    encoder: Encoder,
    vocabulary_size: int,
    *,
    with_bytes: bool = False,
    total_bytes: int | None = None,
    num_repeated: Callable[[], int] = lambda: 0,
) -> TokenFile:
    """Tokenise documents into ``path``; whole or not at all.

    Args:
        path: the ``.bin`` file to write.
        documents: in the order in which they shall stand.
        encoder: text to ids.
        vocabulary_size: every id must be below it.
        with_bytes: also write the bytes of each token.
        total_bytes: text to come, for the progress bar; None when unknown.
        num_repeated: asked at the end how many documents were left out, for the header.

    Raises:
        InputError: an id that the model has no row for.
        MachineError: the disk is full or not writable.
    """
    dtype = "uint16" if vocabulary_size <= 1 << 16 else "uint32"
    files = [path, path.with_suffix(".bytes")] if with_bytes else [path]
    temporaries = [file.with_name(f".{file.name}.writing") for file in files]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            streams = [stack.enter_context(file.open("wb")) for file in temporaries]
            name = path.name.split("-")[0]
            progress = stack.enter_context(Progress(f"tokenising {name}", total_bytes))
            counts = _write(documents, encoder, vocabulary_size, dtype, streams, progress)
        for temporary, file in zip(temporaries, files, strict=True):
            sync(temporary)
            temporary.replace(file)
        header = counts | {"dtype": dtype, "end": encoder.end, "num_repeated": num_repeated()}
        write_text(path.with_suffix(".json"), json.dumps(header, indent=2) + "\n")
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    tokens = read_tokens(path)
    assert tokens is not None
    return tokens


def _write(
    documents: Iterable[Document],
    encoder: Encoder,
    vocabulary_size: int,
    dtype: str,
    streams: Sequence[IO[bytes]],
    progress: Progress,
) -> dict[str, int]:
    import numpy as np

    counts = {"num_tokens": 0, "num_documents": 0, "num_bytes": 0, "largest": 0}
    for batch in batches(documents):
        texts = [document.text for document in batch]
        if len(streams) == 2:
            ids, sizes = encoder.encode_with_bytes(texts)
            streams[1].write(np.concatenate(sizes).tobytes())
        else:
            ids = encoder.encode(texts)
        for document, row in zip(batch, ids, strict=True):
            largest = max(row)
            if largest >= vocabulary_size:
                raise InputError(token_too_large(document.id, largest, vocabulary_size))
            counts["largest"] = max(counts["largest"], largest)
            counts["num_tokens"] += len(row)
            streams[0].write(np.asarray(row, dtype).tobytes())
        num_bytes = sum(len(text.encode("utf-8")) for text in texts)
        counts["num_bytes"] += num_bytes
        counts["num_documents"] += len(batch)
        progress.advance(num_bytes)
    return counts


def token_too_large(where: str, token: int, vocabulary_size: int) -> str:
    """The line for an id that the model has no row for."""
    return (
        f"{where}: token id {token}, but the model's vocabulary has {vocabulary_size} rows; "
        "the tokenizer belongs to another model"
    )


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups that are worth a call of the tokenizer and fit in memory."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes, so that one tokenises and the others find its work done.

    Raises:
        MachineError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: Any = (folder / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be written or locked ({error.strerror or error})") from error
    with lock:
        for stale in folder.glob(".*.writing"):  # of a process that was killed: nobody else is here
            if stale.is_file():
                stale.unlink()
        yield
