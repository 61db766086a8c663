"""The config of a model and its size, without loading the model.

Nothing is downloaded. The sizes of the models in the shipped recipes come with the package; the config of any other
model that is not on this machine is None.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path

from distill.core.errors import InputError
from distill.core.model_config import read_config
from distill.core.model_folder import check_folder, check_no_adapter
from distill.core.outside import is_folder
from distill.models.layouts import find_layout
from distill.models.load import locate
from distill.pruning.layout import Config

AFTER_PADDING = frozenset((
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
))  # fmt: skip
"""``model_type`` of encoders whose first position has the index ``pad_token_id + 1``, so that those before are lost."""
AT_MOST = "vocab_size_is_at_most"
"""Key in the config of a new model: its vocabulary size is only an upper bound until the tokenizer exists."""


def config_of(reference: str) -> Config | None:
    """A model's config; None if it is not on this machine.

    Raises:
        InputError: the folder contains no model, or the reference is neither a folder nor a Hub id.
    """
    location = locate(reference)
    file: Path | None = Path(location) / "config.json"
    if is_folder(location):
        check_folder(Path(location))
        check_no_adapter(Path(location))
        if not os.path.isfile(Path(location) / "config.json"):
            raise InputError(f"{location}: not a model folder (no config.json in it)")
    else:
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(location, "config.json")
        except ValueError as error:
            raise InputError(f"{location}: neither a folder nor a Hub id ({' '.join(str(error).split())})") from None
        file = Path(cached) if isinstance(cached, str) else None
    if file is None:
        return _shipped().get(location)
    config = read_config(file)
    generation = file.with_name("generation_config.json")
    if generation.is_file():  # its end-of-text tokens override those of the config
        config["eos_token_id"] = read_config(generation).get("eos_token_id", config.get("eos_token_id"))
    return config


@cache
def _shipped() -> dict[str, Config]:
    """Hub id -> the part of its config that decides its size."""
    text = (resources.files("distill") / "assets" / "configs.json").read_text(encoding="utf-8")
    configs: dict[str, Config] = json.loads(text)
    return configs


def count(config: Config | None) -> int | None:
    """Number of parameters; None if the architecture has no layout, or the config is not known."""
    layout = find_layout(config) if config else None
    if layout is None or config is None or "vocab_size" not in config:
        return None
    return layout.count(config)


def positions_of(config: Config | None) -> int | None:
    """Tokens that a model can read at once; None if its config is not known or states no number.

    RoBERTa and its like have ``pad_token_id + 1`` more embeddings of positions than tokens can use: 514 for 512.

    Args:
        config: ``config.to_dict()`` or a parsed ``config.json``.
    """
    found = (config or {}).get("max_position_embeddings")
    if config is None or not isinstance(found, int):
        return None
    is_rotary = config.get("position_embedding_type") == "rotary"
    if config.get("model_type") not in AFTER_PADDING or is_rotary:
        return found
    padding = config.get("pad_token_id")
    return found - (1 if padding is None else int(padding)) - 1


def is_counted(config: Config) -> bool:
    """Whether the vocabulary size of a model is known exactly."""
    return "vocab_size" in config and not config.get(AT_MOST)


def size(config: Config | None) -> str:
    """The number of parameters as text."""
    number = count(config)
    if number is None:
        return "a model of unknown size (its config is not on this machine)"
    return f"{number / 1e9:.2f}B parameters" if number >= 1e9 else f"{number / 1e6:.2f}M parameters"


def largest(configs: Iterable[Config]) -> Config | None:
    """The config with the most parameters; None if there are no configs."""
    return max(configs, key=lambda one: count(one) or 0, default=None)
