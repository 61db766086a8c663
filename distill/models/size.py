"""The size of a model: parameters by its architecture, and bytes of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from distill.core.errors import InputError, MachineError
from distill.core.model_folder import WEIGHTS, content_files
from distill.core.outside import read_json
from distill.models.head_names import loader_of, task_of
from distill.models.layouts import layout_of
from distill.pretrained import config_from, model_of

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Attributes:
        parameters: logical parameters, tied ones counted once; packed codes count as the weights that they represent.
        non_embedding_parameters: the same without the input embedding and the output head.
        weight_bytes: bytes of the weight files on disk, including headers and scales.
        bits_per_parameter: mean bits on disk per logical parameter.
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
    """(parameters, non-embedding parameters) by a folder's config, independent of how the weights are stored.

    Raises:
        InputError: transformers cannot build the model that the config describes.
    """
    config = config_from(str(folder))
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it would replace the layers by packed ones
    return count_parameters(_empty(config))


def check_memory(location: str, config: PretrainedConfig, dtype: str | torch.dtype) -> None:
    """Check, before a model is allocated, that it fits into this machine's memory.

    Args:
        location: name of the model, for the message.
        config: of the model.
        dtype: of its weights in memory; "auto": that of the config.

    Raises:
        MachineError: the model does not fit.
    """
    chosen = config.dtype if dtype == "auto" else dtype
    kind = getattr(torch, chosen) if isinstance(chosen, str) else chosen or torch.float32
    try:
        num_parameters = layout_of(config.to_dict()).count(config.to_dict())
    except InputError:  # an architecture without a layout, or a variant
        num_parameters = count_parameters(_empty(config))[0]
    wanted, there = num_parameters * kind.itemsize, psutil.virtual_memory().total + psutil.swap_memory().total
    if wanted > there:
        raise MachineError(
            f"{location}: {num_parameters:.3g} parameters need {wanted / 1e9:,.0f} GB of memory, and this machine has "
            f"{there / 1e9:,.0f} GB; use a smaller model or a larger machine"
        )


def _empty(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_of(config, loader_of(task_of(config)))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(parameters, non-embedding parameters) of a model in memory; tied weights count once."""
    unique = {id(p): p.numel() for p in model.parameters()}
    ends = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    outer = {id(p) for module in ends if module is not None for p in module.parameters()}
    return sum(unique.values()), sum(n for key, n in unique.items() if key not in outer)


def weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> name of its file, for a model in several files; None for a model in a single file.

    Raises:
        InputError: the index is damaged, or has a path that is not in this folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return None
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not all(isinstance(n, str) and Path(n).name == n for n in homes.values()):
        raise InputError(f"{index}: expected a weight_map from each tensor to a file of this folder; download it again")
    return homes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that belong to the model of a folder, sorted by name.

    Raises:
        InputError: there are none, or one is missing.
    """
    whole = folder / "model.safetensors"
    if (homes := weight_map(folder)) is not None:
        files = [folder / name for name in sorted(set(homes.values()))]
    else:
        files = [whole] if whole.is_file() else [file for file in content_files(folder) if file.suffix == WEIGHTS]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"{missing[0]} is missing" if missing else "there are no *.safetensors"
        raise InputError(f"{folder}: {what}; download or copy the model again")
    return files


def weight_bytes(path: str | Path) -> int:
    """Bytes of a weight file, or of the safetensors files of a model folder.

    Raises:
        InputError: there are none.
    """
    path = Path(path)
    return sum(file.stat().st_size for file in ([path] if path.is_file() else weight_files(path)))
