"""Load models from a folder, the Hub or a config; every problem raises an error of one line."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from distill.core.errors import InputError
from distill.core.model_config import check_config
from distill.core.model_folder import with_adapter
from distill.core.outside import is_folder
from distill.core.source import suggest
from distill.core.tasks import Head
from distill.models.head_names import loader_of, task_of
from distill.pretrained import config_from, model_from, model_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

BUILTIN = "builtin:"
Task = Head

__all__ = [
    "BUILTIN", "Task", "another_task", "check_loaded", "check_reachable", "empty_model", "load_config", "load_empty",
    "load_model", "locate", "low_bit_scheme", "move", "new_config", "new_model", "quiet_transformers", "task_of",
    "without_bars",
]  # fmt: skip


def locate(reference: str) -> str:
    """The location of a model: a folder, or a Hub id.

    ``builtin:NAME`` is a folder inside the package. The folder of a stage is replaced by the folder ``model`` in it.

    Raises:
        InputError: there is no built-in model with this name, or no such folder.
    """
    place = os.path.expanduser(reference)
    if reference.startswith(("/", "./", "../", "~")) and not is_folder(place):
        raise InputError(f"{reference}: no such folder")
    if not reference.startswith(BUILTIN):
        if not is_folder(place):
            return reference
        here, within = Path(place), Path(place) / "model"
        return str(within if (within / "config.json").is_file() and not (here / "config.json").is_file() else here)
    folder = Path(str(resources.files("distill"))) / "assets"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    name = reference.removeprefix(BUILTIN)
    if name not in names:
        raise InputError(
            f"{reference}: no such built-in model (expected one of: {', '.join(names) or 'none'}){suggest(name, names)}"
        )
    return str(folder / name)


def check_reachable(location: str) -> None:
    """Check with one request to the Hub that a model can be downloaded; libraries would retry six times, with output.

    Raises:
        InputError: there is no such model, the user has no access, or the Hub cannot be reached.
    """
    location = locate(location)
    if is_folder(location):
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        if not isinstance(try_to_load_from_cache(location, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(location, "config.json"))
    except HFValidationError:
        raise InputError(f"{location}: no such folder, and not a Hub id (expected OWNER/MODEL)") from None
    except GatedRepoError:
        raise InputError(f"{location}: a gated model; accept its terms on its Hub page, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{location}: no such folder, and no such model on the Hub (or a private one); check the name, or set "
            "HF_TOKEN"
        ) from None
    except RemoteEntryNotFoundError:
        raise InputError(
            f"{location}: not a transformers model (no config.json on the Hub); choose another model"
        ) from None
    except OfflineModeIsEnabled:
        raise InputError(
            f"{location}: no such folder, not in the Hub's cache, and HF_HUB_OFFLINE is set; give a folder, or unset it"
        ) from None
    except HfHubHTTPError as error:
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"{location}: no such folder, and the Hub answered {why!r}; check HF_TOKEN, or try again later"
        ) from None
    except Exception:  # without a network or behind a proxy, libraries raise various errors
        raise InputError(
            f"{location}: no such folder, and the Hub cannot be reached; check the name and the network, or give "
            "a folder"
        ) from None


def quiet_transformers() -> None:
    """Disable transformers' progress bars and deprecation notices, which would be mixed with distill's own output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


def without_bars(location: str) -> AbstractContextManager[Any]:
    """Inside the context, discard stderr while a local folder is loaded; downloads keep their progress bar."""
    return redirect_stderr(io.StringIO()) if is_folder(location) else nullcontext()


def load_config(location: str) -> PretrainedConfig:
    """The config of a model folder or Hub id.

    Raises:
        InputError: there is no config, or it is invalid.
    """
    return config_from(locate(location))


def load_model(
    location: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    tasks: Sequence[Task] = ("causal_lm",),
) -> PreTrainedModel:
    """Load a model in evaluation mode, from safetensors files only.

    Low-bit weights are dequantized to plain linear layers. Keys and values are quantized if the config says so
    (:mod:`distill.models.kv_cache`).

    Args:
        location: folder or Hub id.
        dtype: of the weights in memory; "auto": that of the file.
        device: device of the model.
        tasks: the tasks that the caller supports.

    Raises:
        InputError: the model cannot be loaded, has another task, or weights are missing or have the wrong shape
            (transformers would initialize them randomly).
    """
    from distill.models.kv_cache import cache_type, round_cache
    from distill.models.size import check_memory

    quiet_transformers()
    location, config = locate(location), load_config(location)
    task = task_of(config)
    if task not in tasks:
        raise another_task(location, config.model_type, task)
    check_memory(location, config, dtype)
    with without_bars(location):
        model, report = model_from(
            location, loader_of(task), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    check_loaded(location, model, report)
    if low_bit_scheme(model.config):
        from distill.quantization.unpack import unpack

        with without_bars(location):
            unpack(model)
    if (kind := cache_type(model.config)) is not None:
        round_cache(model, kind)
    return move(model, device).eval()


def check_loaded(location: str, model: Any, report: Mapping[str, Any], may_lack: Container[str] = ()) -> None:
    """Refuse a model of which transformers would initialise weights randomly.

    Args:
        location: of the model.
        model: as it was loaded.
        report: ``output_loading_info`` of transformers.
        may_lack: names of weights that may be new.

    Raises:
        InputError: other weights are missing or have the wrong shape.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # an adapter in the same Hub repository
        raise with_adapter(location)
    lacking = [f"{name} is missing" for name in sorted(report["missing_keys"]) if name not in may_lack]
    lacking += [
        f"{name} has shape {[*got]}, expected {[*expected]}"
        for name, got, expected in sorted(report["mismatched_keys"])
    ]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InputError(f"{location}: the weights do not fit the config: {lacking[0]}{more}")


def another_task(
    location: str, kind: str, task: Task, cannot: str = "cannot be used here; set task in the recipe, or choose another"
) -> InputError:
    """The error for a model whose task is not supported by the caller."""
    what = {
        "masked_lm": "an encoder, which predicts masked tokens",
        "classification": "a classifier of texts",
        "token_classification": "a classifier of words",
        "embedding": "an encoder without an output head",
    }
    return InputError(f"{location}: {kind} is {what.get(task, 'a causal language model')}, which {cannot}")


def move(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """``model.to(device)``, whose signature in transformers confuses type checkers."""
    return model.to(device)  # type: ignore[arg-type]


def low_bit_scheme(config: PretrainedConfig) -> bool:
    """Whether the stored weights of a model are low-bit, so that they must be dequantized after loading."""
    return getattr(config, "quantization_config", None) is not None


def new_model(config: PretrainedConfig, *, seed: int, task: Task = "causal_lm") -> PreTrainedModel:
    """A model of this config and head with random weights, the same for the same seed; fp32, on the CPU."""
    import torch

    from distill.models.size import check_memory

    quiet_transformers()
    check_memory(config.model_type, config, "float32")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPU
        return model_of(config, loader_of(task), dtype=torch.float32).eval()


def empty_model(config: PretrainedConfig, task: Task = "causal_lm") -> PreTrainedModel:
    """A model with this config on the device "meta": class and shapes, without values."""
    import torch

    quiet_transformers()
    with torch.device("meta"):
        return model_of(config, loader_of(task)).eval()


def load_empty(location: str) -> PreTrainedModel | None:
    """What :func:`load_model` gives, without its numbers; None where only reading tells: low-bit weights are widened.

    Raises:
        InputError: there is no config, or it is none.
    """
    from distill.models.kv_cache import cache_type, round_cache

    config = load_config(location)
    if low_bit_scheme(config):
        return None
    model = empty_model(config)
    if (kind := cache_type(config)) is not None:
        round_cache(model, kind)
    return model


def new_config(keys: dict[str, Any]) -> PretrainedConfig:
    """A config from ``model_type`` and its keys; unknown keys are an error.

    Raises:
        InputError: ``model_type`` or a key is unknown, or the config class rejects a value.
    """
    from transformers import AutoConfig

    check_config(keys, "config")
    rest = dict(keys)
    model_type = rest.pop("model_type", None)
    if model_type is None:
        raise InputError("config: model_type is missing (for example: model_type: llama)")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        raise InputError(f"config: no model_type {model_type!r}{suggest(model_type, CONFIG_MAPPING)}") from None
    names = set(known.to_dict()) | set(type(known).__annotations__)
    if "rope_parameters" in names:
        names.add("rope_theta")  # the key of older configs
    for key in rest:
        if key not in names:
            raise InputError(f"config: {model_type} has no key {key!r}{suggest(key, names)}")
    for key, value in rest.items():
        hint: Any = type(known).__annotations__.get(key)
        kinds = get_args(hint) or (hint,)
        if type(value) is int and float in kinds and int not in kinds:  # a recipe may have 30 for 30.0
            rest[key] = float(value)
    try:
        return AutoConfig.for_model(model_type, **rest)
    except Exception as error:  # config classes raise various errors
        raise InputError(f"config: {model_type} rejects the values ({' '.join(str(error).split())})") from error
