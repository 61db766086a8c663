"""Reads a saved model folder back and compares it with the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill.core.errors import DistillError, InputError
from distill.models.head_names import head_of
from distill.models.load import load_model
from distill.models.weight_files import Shards

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel


def check_written(folder: Path, model: PreTrainedModel) -> None:
    """Compare the name, shape, type and bytes of every weight in a folder with those of the saved model.

    One weight at a time is in memory, except for formats that only transformers' loader supports.

    Args:
        folder: written by ``save_pretrained``.
        model: on the CPU, in the type of the folder.

    Raises:
        DistillError: a weight differs or is missing.
    """
    tied = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    try:
        read = _reader(folder, model)
        for name, trained in model.state_dict().items():
            if name not in tied and (wrong := _difference(read(name), trained)):
                raise DistillError(f"{folder}: {name} is {wrong}")
    except DistillError as error:
        why = str(error).removeprefix(f"{folder}: ")
        raise DistillError(
            f"{folder}: the saved model differs from the model in memory: {why}; check the disk, and run again"
        ) from error


def _reader(folder: Path, model: PreTrainedModel) -> Callable[[str], Tensor]:
    """A function that reads the stored value of a weight, given its name in the model.

    Raises:
        InputError: the folder cannot be loaded, or a weight is missing.
    """
    try:
        return Shards(str(folder), head_of(model)).value
    except InputError:  # damaged, or a format that only transformers' loader supports
        return load_model(str(folder), dtype=model.dtype, tasks=(head_of(model),)).state_dict().__getitem__


def _difference(stored: Tensor, trained: Tensor) -> str | None:
    """How a stored tensor differs, as text; None if it does not. Bytes are compared, so NaN equals NaN."""
    import torch

    if stored.shape != trained.shape:
        return f"{[*stored.shape]}, expected {[*trained.shape]}"
    if stored.dtype != trained.dtype:
        return f"{stored.dtype}, expected {trained.dtype}"
    ours, theirs = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (stored, trained))
    return None if torch.equal(ours, theirs) else "stored with other values"
