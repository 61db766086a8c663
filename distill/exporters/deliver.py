"""Copies the files of a model and its tokenizer into an export, and no links to files outside of the folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from distill.core.errors import InputError
from distill.core.model_folder import FILES, check_folder
from distill.core.outside import opened


def copy_files(source_folder: Path, folder: Path, *, weights: bool = False) -> None:
    """Copy a model's config, tokenizer and, optionally, weights; other files of the folder are not copied.

    Args:
        source_folder: the model's folder.
        folder: target folder; must exist.
        weights: whether to copy the safetensors.

    Raises:
        InputError: a file is a link to outside of the folder, or cannot be read.
    """
    for file in files_to_copy(source_folder, weights=weights):
        with opened(file) as stream, (folder / file.name).open("wb") as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)


def files_to_copy(source_folder: Path, *, weights: bool = False) -> list[Path]:
    """The files that :func:`copy_files` copies.

    Raises:
        InputError: see there.
    """
    from distill.models.size import INDEX, weight_files

    wanted = FILES | ({INDEX, *(file.name for file in weight_files(source_folder))} if weights else set())
    files = [file for file in check_folder(source_folder) if file.name in wanted]
    for file in files:
        _refuse_elsewhere(file, source_folder.resolve())
    return files


def _refuse_elsewhere(file: Path, folder: Path) -> None:
    """Raise for a link out of the folder; in the Hub's cache, links within the cache are allowed."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache, target = Path(HF_HUB_CACHE).resolve(), file.resolve()
    home = cache if folder.is_relative_to(cache) else folder
    if not target.is_relative_to(home):
        raise InputError(
            f"{file}: a link to {target}, which is outside of the folder, so it is not exported; replace it by the file"
        )
