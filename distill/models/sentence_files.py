"""The files by which sentence-transformers knows how a model folder makes embeddings.

modules.json                what follows what: the model, pooling, and normalisation where there is one
1_Pooling/config.json       how hidden states become one vector
sentence_bert_config.json   longest text in tokens
"""

from __future__ import annotations

import json
from pathlib import Path

from distill.core.errors import InputError
from distill.core.outside import is_folder, read_json

MODULES, POOLING, LENGTH = "modules.json", "1_Pooling", "sentence_bert_config.json"
_TYPES = "sentence_transformers.models"


def write_sentence_files(folder: Path, *, width: int, pooling: str, normalize: bool, max_length: int) -> None:
    """Write the files into a model folder.

    Args:
        folder: of the model.
        width: channels of an embedding.
        pooling: "mean" or "cls".
        normalize: whether embeddings are scaled to length 1.
        max_length: tokens of a text, at most.
    """
    kinds = [("", "Transformer"), (POOLING, "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"{_TYPES}.{kind}"} for at, (path, kind) in enumerate(kinds)
    ]
    modes = {f"pooling_mode_{kind}": False for kind in ("cls_token", "mean_tokens", "max_tokens")}
    modes["pooling_mode_cls_token" if pooling == "cls" else "pooling_mode_mean_tokens"] = True
    (folder / POOLING).mkdir(exist_ok=True)
    if normalize:
        (folder / "2_Normalize").mkdir(exist_ok=True)
    _write(folder / MODULES, modules)
    _write(folder / POOLING / "config.json", {"word_embedding_dimension": width, **modes})
    _write(folder / LENGTH, {"max_seq_length": max_length, "do_lower_case": False})


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_sentence_encoder(folder: Path) -> bool:
    """Whether a folder says how it makes embeddings."""
    return (folder / MODULES).is_file()


def read_pooling(location: str) -> tuple[str, bool] | None:
    """(pooling, whether embeddings are scaled to length 1) of a folder; None where it does not say.

    Raises:
        InputError: it pools in another way than by the mean or the first token.
    """
    folder = Path(location)
    if not is_folder(location) or not is_sentence_encoder(folder) or not (folder / POOLING / "config.json").is_file():
        return None
    modules, modes = (
        json.loads((folder / MODULES).read_text(encoding="utf-8")),
        read_json(folder / POOLING / "config.json"),
    )
    on = [
        key.removeprefix("pooling_mode_") for key, value in modes.items() if key.startswith("pooling_mode_") and value
    ]
    kind = {"mean_tokens": "mean", "cls_token": "cls"}.get(on[0]) if len(on) == 1 else None
    if kind is None:
        raise InputError(
            f"{location}: pools by {' and '.join(on) or 'nothing'}, which task: embedding does not know (expected mean "
            "or cls); use another model"
        )
    return kind, any(str(one.get("type", "")).endswith("Normalize") for one in modules if isinstance(one, dict))


def copy_sentence_files(source: Path, folder: Path) -> None:
    """Write into an export what a model's folder says about its embeddings, where it says anything."""
    pooling = read_pooling(str(source))
    if pooling is None:
        return
    width = int(read_json(source / POOLING / "config.json").get("word_embedding_dimension", 0))
    length = read_json(source / LENGTH) if (source / LENGTH).is_file() else {}
    write_sentence_files(
        folder,
        width=width,
        pooling=pooling[0],
        normalize=pooling[1],
        max_length=int(length.get("max_seq_length") or 512),
    )
