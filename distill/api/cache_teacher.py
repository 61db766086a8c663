"""Ask a teacher once: its output on batches of text goes to disk, and students learn without the teacher in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel

from distill.api.batches import Batch, TextRows, as_it_is
from distill.api.spec import checked
from distill.core.artifact import hash_of, replacing
from distill.core.errors import InputError
from distill.data.packing import file_lock
from distill.data.spec import APART
from distill.data.teacher_cache import CODECS, Hidden
from distill.data.teacher_cache.base import CodecSpec
from distill.data.teacher_cache.cache import CachedRows, CacheLocation
from distill.data.teacher_cache.head_file import head_file, is_whole, seal
from distill.data.teacher_cache.identity import Identity
from distill.data.teacher_cache.write_cache import Live, fill
from distill.models.head import check_head, hidden_states, output_head, save_head
from distill.models.packed import check_apart
from distill.training.cached_teacher import CachedTeacher


class CachedTextRows(CachedRows):
    """Rows in memory with the cached output of a teacher, of which a ``DataLoader`` takes a batch at once."""

    def __getitems__(self, numbers: list[int]) -> Batch:
        """The rows ``numbers`` as one batch, for ``DataLoader``."""
        return self[numbers]


@dataclass(frozen=True)
class Cached:
    """A teacher's output on disk, and what trains on it.

    Attributes:
        teacher: takes the place of the model: ``DistillationModule(student, losses, cached.teacher)``.
        batches: the training batches, with the teacher's output.
        validation: the validation batches, with it; None without validation text.
        folder: of the cache.
        fidelity: how much of the teacher's distributions the codec keeps.
    """

    teacher: CachedTeacher
    batches: DataLoader[Batch]
    validation: DataLoader[Batch] | None
    folder: Path
    fidelity: Mapping[str, Any]


def cache_teacher(
    teacher: PreTrainedModel,
    batches: DataLoader[Batch],
    folder: str | Path,
    *,
    validation: DataLoader[Batch] | None = None,
    codec: CodecSpec | Mapping[str, Any] | str = "top_k",
) -> Cached:
    """Write down what a teacher says about some text, so that any number of students learn from it without the teacher.

    What the folder holds already is not computed again; a call that was killed goes on where it was left.

    Args:
        teacher: a causal language model, on the device where it shall run.
        batches: training text, from :func:`distill.batches`.
        folder: of the cache; created if it is not there.
        validation: held-out text, from :func:`distill.batches`. Its cache holds hidden states, so that the KL of a
            validation is exact.
        codec: how much of each distribution is kept: ``"top_k"``, ``"sampled"`` or ``"hidden"``, or settings such as
            ``{"kind": "top_k", "k": 64}``.

    Returns:
        What takes the place of the teacher, and the batches with its output.

    Raises:
        InputError: the batches are not from :func:`distill.batches`, the folder holds the cache of another teacher or
            text, or the codec does not fit the vocabulary.
        MachineError: the disk is full or not writable.

    Examples:
        >>> import distill, tempfile
        >>> teacher, tokenizer = distill.load("builtin:quickstart-teacher")
        >>> batches = distill.batches(["The cat sat on the mat. " * 20], tokenizer, sequence_length=64)
        >>> cached = distill.cache_teacher(teacher, batches, tempfile.mkdtemp(), codec={"kind": "top_k", "k": 16})
        >>> module = distill.DistillationModule(teacher, [distill.losses.ForwardKL()], cached.teacher)
    """
    spec = checked(cast("type[CodecSpec]", Annotated[CodecSpec, CODECS]), codec, "codec")
    for name, loader in (("batches", batches), ("validation", validation)):
        if loader is not None and not isinstance(getattr(loader, "dataset", None), TextRows):
            raise InputError(f"{name}: got {type(loader).__name__}, expected the result of distill.batches")
    config = teacher.config.get_text_config()
    if why := spec.refuses(config.vocab_size):
        raise InputError(f"codec: {why}")
    check_head(teacher)
    live = Live(lambda batch: hidden_states(teacher, **batch), output_head(teacher).logits, teacher.device)
    whose, place, training = _hash_of_weights(teacher), Path(folder), teacher.training
    teacher.eval()
    try:
        train, fidelity = _filled(place / "train", teacher, whose, batches, spec, live)
        held_out = None
        if validation is not None:
            held_out, _ = _filled(place / "validation", teacher, whose, validation, Hidden(), live)
        head = head_file(place)
        with file_lock(place):
            if not is_whole(head):
                with replacing(head.parent) as temporary:
                    save_head(teacher, temporary / head.name)
                    seal(temporary / head.name)
    finally:
        teacher.train(training)
    source = CachedTeacher(config.vocab_size, head, whole=spec.whole, dtype=torch.float32)
    return Cached(source, train, held_out, place, fidelity)


def _filled(
    folder: Path, teacher: PreTrainedModel, whose: str, loader: DataLoader[Batch], codec: CodecSpec, live: Live
) -> tuple[DataLoader[Batch], Mapping[str, Any]]:
    """A loader of the rows with the teacher's output, and the fidelity of the cache."""
    rows: Any = loader.dataset
    if rows.packing in APART:
        check_apart(teacher)
    config = teacher.config.get_text_config()
    identity = Identity(
        whose, "in memory", _hash_of_text(rows), rows.sequence_length, rows.packing, codec.model_dump(mode="json")
    )
    place = CacheLocation(folder, identity, codec, 0, config.vocab_size)
    place = replace(place, width=config.hidden_size if codec.reads == "hidden" else config.vocab_size)
    header = fill(
        place,
        rows.tokens,
        place.needed(rows, range(len(rows))),
        lambda: live,
        batch_size=loader.batch_size or 1,
        what=folder.name,
        say=lambda line: None,
    )
    again = DataLoader(
        CachedTextRows(rows, place),
        batch_size=loader.batch_size,
        shuffle=isinstance(loader.sampler, RandomSampler),
        generator=loader.generator,
        collate_fn=as_it_is,
    )
    return again, header["fidelity"]


def _hash_of_weights(model: PreTrainedModel) -> str:
    """Stands for the values of all weights, and their names and types."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash_of_text(rows: TextRows) -> str:
    """Stands for the tokens of the rows, where their documents begin, and which of them are learned from."""
    tokens, digest = rows.tokens, hashlib.sha256()
    for array in (tokens.ids(), tokens.bounds(), tokens.learned()):
        digest.update(b"" if array is None else array.tobytes())
    return hash_of(digest.hexdigest(), tokens.filling, *tokens.start)
