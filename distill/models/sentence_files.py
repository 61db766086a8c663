"""The files by which sentence-transformers knows how a model folder makes embeddings.

modules.json                what follows what: the model, pooling, and normalisation where there is one
1_Pooling/config.json       how hidden states become one vector
sentence_bert_config.json   longest text in tokens
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.core.errors import InputError
from distill.core.outside import is_folder, read_json, read_json_list

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
        InputError: a file is damaged, it pools in another way than by the mean or the first token, or has further
            modules, such as a linear layer behind the pooling.
    """
    folder = Path(location)
    if not is_folder(location) or not is_sentence_encoder(folder):
        return None
    kinds: list[str] = []
    for module in read_json_list(folder / MODULES):
        kinds.append(str(module.get("type", "") if isinstance(module, dict) else module).rpartition(".")[2])
        if kinds[-1] not in ("Transformer", "Pooling", "Normalize"):
            raise InputError(
                f"{location}: {MODULES} has a module {kinds[-1]!r}, and task: embedding knows Transformer, Pooling and "
                "Normalize; use another model"
            )
    if "Pooling" not in kinds:
        return None
    modes = _modes(read_json(folder / POOLING / "config.json"))
    kind = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}.get("+".join(modes))
    if kind is None:
        raise InputError(
            f"{location}: pools by {' and '.join(modes) or 'nothing'}, which task: embedding does not know (expected "
            "mean or cls); use another model"
        )
    return kind, "Normalize" in kinds


def _modes(config: dict[str, Any]) -> list[str]:
    """How a folder pools: one key with a name or several in current releases, a key per way in earlier ones."""
    named = config.get("pooling_mode")
    if named is not None:
        return [str(mode) for mode in (named if isinstance(named, list) else [named])]
    prefix = "pooling_mode_"
    return [key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value is True]


def read_length(location: str) -> int | None:
    """Tokens of a text, at most, that a folder states; None where it states none.

    Raises:
        InputError: the file is damaged.
    """
    file = Path(location) / LENGTH
    if not is_folder(location) or not file.is_file():
        return None
    stated = read_json(file).get("max_seq_length")
    return stated if isinstance(stated, int) and stated > 0 else None


def copy_sentence_files(source: Path, folder: Path) -> None:
    """Write into an export what a model's folder says about its embeddings, where it says anything."""
    pooling = read_pooling(str(source))
    if pooling is None:
        return
    config = read_json(source / POOLING / "config.json")
    width = int(config.get("embedding_dimension") or config.get("word_embedding_dimension") or 0)
    write_sentence_files(
        folder,
        width=width,
        pooling=pooling[0],
        normalize=pooling[1],
        max_length=read_length(str(source)) or 512,
    )
