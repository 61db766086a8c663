"""The weights of a model folder by the names of the model's parameters, one at a time, so that none must fit in memory.

Checkpoints name and cut their tensors as they please - older names, experts one by one, a body without its prefix. What
transformers' loader knows of that is asked for each parameter, instead of for the whole model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.models.load import empty_model, load_config, load_model, locate, low_bit_scheme
from distill.models.size import weight_map

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from distill.pruning.layout import Layout
    from distill.pruning.plan import Plan


class Shards:
    """A model folder's safetensors files, opened for each parameter, so that none stays mapped into memory.

    Attributes:
        model: the folder's model on the device "meta": class, shapes, config and generation config, no weights.

    Raises:
        InputError: the files lack a parameter of the model, or hold low-bit weights.
    """

    def __init__(self, location: str, layout: Layout):
        self.folder = _local(location)
        self.model = _empty_model(str(self.folder), layout)
        self._homes = _homes(self.folder)
        self._sources = _sources(self.model, self._homes)
        lacking = [name for name, _ in self.model.named_parameters() if name not in self._sources]
        if lacking:
            raise InputError(f"{location}: the weights do not fit the config: {lacking[0]} is missing")

    def read(self, name: str) -> Tensor:
        """The value of a parameter of the model, put together from as many tensors as the files keep it in.

        Raises:
            InputError: it is not of the shape that the config says.
        """
        value, expected = self._value(name), self.model.get_parameter(name).shape
        if value.shape != expected:
            raise InputError(
                f"{self.folder}: the weights do not fit the config: {name} is {[*value.shape]}, not {[*expected]}"
            )
        return value

    def _value(self, name: str) -> Tensor:
        converter, tensors = self._sources[name]
        if converter is None:
            return self._tensor(tensors[0][0])
        converter = copy.deepcopy(converter)
        for key, pattern in tensors:
            converter.add_tensor(name, key, pattern, self._tensor(key))
        value = converter.convert(name, model=self.model, config=self.model.config)[name]
        return value[0] if isinstance(value, list) else value

    def _tensor(self, key: str) -> Tensor:
        with _opened(self.folder / self._homes[key]) as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor


def carve_folder(location: str, plan: Plan, layout: Layout, dtype: torch.dtype) -> PreTrainedModel:
    """The pruned model of a folder or Hub id; in memory are the pruned model and one parameter of the unpruned one.

    Low-bit weights are the exception: they are widened first, in a whole model.

    Args:
        location: folder or Hub id.
        plan: made for this model.
        layout: the layout of its architecture.
        dtype: of the pruned model in memory.

    Raises:
        InputError: see :class:`Shards` and :func:`distill.pruning.surgery.carve`.
    """
    from distill.pruning.surgery import apply, carve

    if low_bit_scheme(load_config(location)):
        return apply(load_model(location, dtype=dtype), plan, layout)
    shards = Shards(location, layout)
    return carve(shards.model, plan, layout, shards.read, dtype)


def _local(location: str) -> Path:
    folder = Path(locate(location))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.json"]))


def _empty_model(location: str, layout: Layout) -> PreTrainedModel:
    from transformers import GenerationConfig

    config = load_config(location)
    if low_bit_scheme(config):
        raise InputError(f"{location}: holds low-bit weights, which cannot be read one by one")
    model = empty_model(config, layout.task)
    if (Path(location) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(location)
    return model


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error}); download or copy it again") from error


def _homes(folder: Path) -> dict[str, str]:
    """Tensor -> the file that holds it."""
    if (homes := weight_map(folder)) is not None:
        return homes
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}: no model.safetensors in it; weights of another format cannot be cut")
    with _opened(folder / "model.safetensors") as opened:
        return dict.fromkeys(opened.keys(), "model.safetensors")


def _sources(model: PreTrainedModel, keys: dict[str, str]) -> dict[str, tuple[Any, list[tuple[str, str]]]]:
    """Parameter -> (converter or None, [(tensor, the pattern of the converter that it matches)])."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

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
