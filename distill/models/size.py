"""How large a model is: parameters as the architecture counts them, bytes as the disk holds them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from distill.core.artifact import read_json
from distill.core.errors import InputError


@dataclass(frozen=True)
class Size:
    """What a model weighs.

    Attributes:
        parameters: logical parameters, tied ones once; a packed 4-bit weight counts as the weights that it stands for.
        non_embedding_parameters: the same without the input embedding and the output head.
        weight_bytes: bytes of the weight files on disk, with their headers and scales.
        bits_per_parameter: mean bits on disk for each logical parameter.
    """

    parameters: int
    non_embedding_parameters: int
    weight_bytes: int
    bits_per_parameter: float


def measure_size(folder: str | Path, weights: str | Path | None = None) -> Size:
    """Measure a model folder in Hugging Face layout; reads the config and file sizes, never the weights.

    Args:
        folder: holds ``config.json`` and, unless ``weights`` is given, the ``*.safetensors``.
        weights: another weight file or folder of the same model, such as a GGUF export.

    Raises:
        InputError: no config or no weights there.
    """
    parameters, non_embedding = parameters_of(folder)
    size = weight_bytes(weights or folder)
    return Size(parameters, non_embedding, size, 8 * size / parameters)


def parameters_of(folder: str | Path) -> tuple[int, int]:
    """(parameters, non-embedding parameters) that a folder's config stands for, however its weights are packed.

    Raises:
        InputError: transformers cannot build the model that the config describes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = copy.deepcopy(AutoConfig.from_pretrained(folder))
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it would swap the layers for packed ones
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: its parameters cannot be counted: {str(error).splitlines()[0]}") from None
    return count_parameters(model)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(parameters, non-embedding parameters) of a model in memory; tied weights count once."""
    unique = {id(p): p.numel() for p in model.parameters()}
    ends = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    outer = {id(p) for module in ends if module is not None for p in module.parameters()}
    return sum(unique.values()), sum(n for key, n in unique.items() if key not in outer)


def weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> name of the file that holds it, of a model in several files; None of one in a single file.

    Raises:
        InputError: the index is damaged, or names what is not a file of this folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not all(isinstance(n, str) and Path(n).name == n for n in homes.values()):
        raise InputError(f"{index}: expected weight_map, from each tensor to a file of this folder; fetch it anew")
    return homes


def weight_bytes(path: str | Path) -> int:
    """Bytes of a weight file, or of the safetensors files that a model folder really uses.

    Raises:
        InputError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    if (homes := weight_map(path)) is not None:
        files = [path / name for name in set(homes.values())]
    elif (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]
    else:
        files = sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise InputError(f"{path}: {', '.join(missing) or 'no *.safetensors'} missing, so its size cannot be measured")
    return sum(file.stat().st_size for file in files)
