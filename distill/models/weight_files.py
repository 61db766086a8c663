"""Reads the weights of a model folder one parameter at a time, so that the model need not fit into memory.

Names and shapes in checkpoints differ from those of the parameters: older names, one tensor per expert, no prefix. The
conversion rules of transformers' loader are applied to each parameter separately.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from distill.core.errors import InputError
from distill.core.tasks import Head
from distill.models.load import empty_model, load_config, load_model, locate, low_bit_scheme
from distill.models.size import weight_map
from distill.pretrained import generation_config_from
from distill.pruning.layout import Layout
from distill.pruning.plan import Plan
from distill.pruning.surgery import apply, build_pruned_model


class Shards:
    """The safetensors files of a model folder; a file is mapped into memory only while a parameter is read.

    Args:
        location: folder or Hub id.
        task: task of the model.

    Attributes:
        model: the folder's model on the device "meta": class, shapes, config and generation config, without weights.

    Raises:
        InputError: a parameter of the model is not in the files, or the weights are low-bit.
    """

    def __init__(self, location: str, task: Head = "causal_lm"):
        self.folder = _local(location)
        self.model = _empty_model(str(self.folder), task)
        self._homes = _homes(self.folder)
        self._sources = _sources(self.model, self._homes)
        lacking = [name for name, _ in self.model.named_parameters() if name not in self._sources]
        if lacking:
            raise InputError(f"{location}: the weights do not fit the config: {lacking[0]} is missing")

    def read(self, name: str) -> Tensor:
        """The value of a parameter, assembled from one or more stored tensors.

        Raises:
            InputError: the shape does not agree with the config.
        """
        value, expected = self.value(name), self.model.get_parameter(name).shape
        if value.shape != expected:
            raise InputError(
                f"{self.folder}: the weights do not fit the config: {name} has shape {[*value.shape]}, expected "
                f"{[*expected]}"
            )
        return value

    def value(self, name: str) -> Tensor:
        """:meth:`read` without the check of the shape, also for buffers.

        Raises:
            InputError: the files do not contain it.
        """
        if name not in self._sources:
            raise InputError(f"{self.folder}: the weights do not fit the config: {name} is missing")
        converter, tensors = self._sources[name]
        if converter is None:
            return self._tensor(tensors[0][0])
        converter = copy.deepcopy(converter)
        for key, pattern in tensors:
            converter.add_tensor(name, key, pattern, self._tensor(key))
        value = converter.convert(name, model=self.model, config=self.model.config)[name]
        return value[0] if isinstance(value, list) else value

    def _tensor(self, key: str) -> Tensor:
        with opened_weights(self.folder / self._homes[key]) as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor


def prune_folder(location: str, plan: Plan, layout: Layout, dtype: torch.dtype) -> PreTrainedModel:
    """Prune the model of a folder or Hub id, with only the pruned model and one original parameter in memory.

    Low-bit weights are an exception: the full model is loaded and dequantized first.

    Args:
        location: folder or Hub id.
        plan: made for this model.
        layout: the layout of its architecture.
        dtype: of the pruned model in memory.

    Raises:
        InputError: see :class:`Shards` and :func:`distill.pruning.surgery.build_pruned_model`.
    """
    if low_bit_scheme(load_config(location)):
        return apply(load_model(location, dtype=dtype, tasks=(layout.task,)), plan, layout)
    shards = Shards(location, layout.task)
    return build_pruned_model(shards.model, plan, layout, shards.read, dtype)


def _local(location: str) -> Path:
    folder = Path(locate(location))
    if folder.is_dir():
        return folder
    return Path(snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.json"]))


def _empty_model(location: str, task: Head) -> PreTrainedModel:
    config = load_config(location)
    if low_bit_scheme(config):
        raise InputError(f"{location}: has low-bit weights, which cannot be read one at a time; use the original model")
    model = empty_model(config, task)
    if (generation := generation_config_from(location)) is not None:
        model.generation_config = generation
    return model


def opened_weights(file: Path) -> Any:
    """Open a safetensors file as a memory map; use it as a context manager.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error}); download or copy it again") from error


def _homes(folder: Path) -> dict[str, str]:
    """Tensor -> the file that holds it."""
    if (homes := weight_map(folder)) is not None:
        return homes
    if not (folder / "model.safetensors").is_file():
        raise InputError(
            f"{folder}: no model.safetensors in it; pruning supports safetensors only, so convert the model"
        )
    with opened_weights(folder / "model.safetensors") as opened:
        return dict.fromkeys(opened.keys(), "model.safetensors")


def _sources(model: PreTrainedModel, keys: dict[str, str]) -> dict[str, tuple[Any, list[tuple[str, str]]]]:
    """Parameter -> (converter or None, [(stored tensor, the pattern of the converter that matches it)])."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = key, None
        sources.setdefault(name, (by_pattern.get(pattern or ""), []))[1].append((key, pattern or key))
    for second, first in model.all_tied_weights_keys.items():  # some files hold a tied weight under its second name
        if first not in sources and second in sources:
            sources[first] = sources[second]
    return sources
