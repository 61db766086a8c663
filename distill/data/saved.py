"""Folders that ``datasets.Dataset.save_to_disk`` has written: one document per row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from distill.core.errors import InputError
from distill.core.outside import is_folder, read_json
from distill.data.columns import ColumnsSpec, Numbered
from distill.data.file_source import FileSource
from distill.data.files import File

OF_SPLITS = "dataset_dict.json"


class Saved(FileSource, ColumnsSpec):
    """A folder written by `save_to_disk` of the library datasets, mapped into memory; a row is a document."""

    kind: Literal["saved"] = "saved"
    path: str
    """The folder."""
    split: str | None = None
    """Name of the split, if the folder was written from a DatasetDict; otherwise null."""

    def rows(self, columns: frozenset[str] | None) -> Iterator[Numbered]:
        """Yield every row, in the data set's order."""
        from distill.data import saved_rows

        return saved_rows.read(self._folder(), columns, self)

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Class names from a ``ClassLabel`` feature or a list of them, as ``dataset_info.json`` stores them."""
        file = self._folder() / "dataset_info.json"
        features = read_json(file).get("features") if file.is_file() else None
        feature = features.get(column) if isinstance(features, dict) else None
        if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        names = feature.get("names") if isinstance(feature, dict) else None
        return tuple(map(str, names)) if isinstance(names, list) and names else None

    def _files(self) -> list[File]:
        """The files that ``state.json`` names, in its order; ``datasets`` leaves other files of its own beside them.

        Raises:
            InputError: it names no file, or one that is not in the folder.
        """
        folder, names = self._folder(), list[str]()
        listed = read_json(folder / "state.json").get("_data_files")
        for one in listed if isinstance(listed, list) else []:
            name = one.get("filename") if isinstance(one, dict) else None
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(f"{folder}: state.json names {name!r}, which is no file in it; save it again")
            names.append(name)
        if not names:
            raise InputError(f"{folder}: state.json names no data files; save it again")
        return [folder / name for name in names]

    def _folder(self) -> Path:
        """Folder of the rows.

        Raises:
            InputError: the folder does not exist, is not of this kind, or the split must be named.
        """
        folder = Path(self.path).expanduser()
        if not is_folder(folder):
            raise InputError(f"{self.path}: no such folder, seen from {Path.cwd()}")
        if (folder / OF_SPLITS).is_file():
            splits = [name for name in read_json(folder / OF_SPLITS).get("splits", []) if isinstance(name, str)]
            if self.split not in splits or Path(self.split).name != self.split:
                got = "" if self.split is None else f" (got {self.split!r})"
                raise InputError(f"{self.path}: has the splits {', '.join(splits) or 'none'}; set split to one{got}")
            folder /= self.split
        elif self.split is not None:
            raise InputError(f"{self.path}: has no splits, so split: {self.split} has no effect; remove it")
        if not (folder / "state.json").is_file():
            raise InputError(
                f"{folder}: was not written by save_to_disk (it has no state.json); use kind: hub for a folder of "
                "parquet, JSON or CSV files, or kind: parquet"
            )
        return folder
