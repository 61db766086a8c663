"""Models from a folder, the Hub or a config, with every doubt turned into one clear line."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from distill.core.errors import InputError
from distill.core.source import suggest

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

BUILTIN = "builtin:"
CLASSIFIER = "ForSequenceClassification"
Task = Literal["causal_lm", "masked_lm", "classification"]


def locate(reference: str) -> str:
    """Where a model lives: a folder stays itself (a stage's folder of a run is that of the model in it),
    ``builtin:NAME`` is the folder inside the package, else a Hub id.

    Raises:
        InputError: no builtin of that name, or no such folder.
    """
    if reference.startswith(("/", "./", "../", "~")) and not Path(reference).expanduser().is_dir():
        raise InputError(f"{reference}: no such folder")
    if not reference.startswith(BUILTIN):
        here = Path(reference).expanduser()
        within = here / "model"
        if (within / "config.json").is_file() and not (here / "config.json").is_file():
            here = within
        return str(here) if here.is_dir() else reference
    folder = Path(str(resources.files("distill"))) / "assets"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    name = reference.removeprefix(BUILTIN)
    if name not in names:
        raise InputError(
            f"{reference}: no such builtin model (there is: {', '.join(names) or 'none'}){suggest(name, names)}"
        )
    return str(folder / name)


def check_reachable(location: str) -> None:
    """Refuse a Hub id that cannot be had, after one question to the Hub; a library would ask six times, aloud.

    Raises:
        InputError: no such id, one that is closed to this user, or no Hub to ask.
    """
    location = locate(location)
    if Path(location).is_dir():
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
        raise InputError(f"{location}: no folder here, and a Hub id is <who>/<model>") from None
    except GatedRepoError:
        raise InputError(f"{location}: closed until you accept its terms on its page; then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{location}: no folder here and no such model on the Hub, or a private one; give a folder, check the id, "
            "or set HF_TOKEN"
        ) from None
    except RemoteEntryNotFoundError:
        raise InputError(f"{location}: has no config.json, so it is no model of transformers; name another") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{location}: no folder here and none in the Hub's cache, and HF_HUB_OFFLINE is set") from None
    except HfHubHTTPError as error:
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"{location}: no folder here, and the Hub answers {why!r}; look at HF_TOKEN, or try again later"
        ) from None
    except Exception:  # no network, a proxy in the way, a Hub that is down: libraries raise what they like
        raise InputError(
            f"{location}: no folder here, and the Hub cannot be reached; give a folder, or check the id and the network"
        ) from None


def _from_pretrained(loader: Any, location: str, what: str, **arguments: Any) -> Any:
    """Call a transformers loader; its many ways to fail become one line each."""
    location = locate(location)
    folder = Path(location)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{location}: not a model folder (no config.json in it)")
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    refusals = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)
    try:
        return loader.from_pretrained(location, trust_remote_code=False, **arguments)
    except refusals as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # a line that ends in a colon only announces the next one
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        if isinstance(error, SafetensorError):
            reason += "; its file is damaged: download or copy it again"
        raise InputError(f"{location}: cannot load the {what} ({reason})") from error


def quiet_transformers() -> None:
    """No bars for loading and writing shards and no renaming notices; they would run across our own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


def without_bars(location: str) -> AbstractContextManager[Any]:
    """Swallow what libraries draw on stderr while a local folder loads; a download keeps its bar, errors raise."""
    return redirect_stderr(io.StringIO()) if Path(location).is_dir() else nullcontext()


def load_config(location: str) -> PretrainedConfig:
    """The config of a model folder or Hub id.

    Raises:
        InputError: there is none, or it is no config.
    """
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, location, "config")


def load_model(
    location: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    tasks: Sequence[Task] = ("causal_lm",),
) -> PreTrainedModel:
    """A model, whole, from safetensors only, in evaluation mode; a causal language model unless others are welcome.

    Low-bit weights are widened to plain linear layers of the same values; keys and values are rounded where the config
    says so (:mod:`distill.models.kv_cache`).

    Args:
        location: folder or Hub id.
        dtype: of the weights in memory; "auto" is that of the file.
        device: where to.
        tasks: what the caller can use.

    Raises:
        InputError: it cannot be loaded, has another task, or weights are missing or of the wrong shape (transformers
            would fill them with random numbers).
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    from distill.models.kv_cache import cache_type, round_cache

    quiet_transformers()
    task = task_of(load_config(location))
    if task not in tasks:
        raise another_task(location, load_config(location).model_type, task)
    loaders = {"masked_lm": AutoModelForMaskedLM, "classification": AutoModelForSequenceClassification}
    loader = loaders.get(task, AutoModelForCausalLM)
    arguments = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with without_bars(location):
        model, report = _from_pretrained(loader, location, "model", **arguments)
    lacking = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    lacking += [f"{name} is {[*got]}, not {[*expected]}" for name, got, expected in sorted(report["mismatched_keys"])]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InputError(f"{location}: the weights do not fit the config: {lacking[0]}{more}")
    if low_bit_scheme(model.config):
        from distill.quantization.unpack import unpack

        with without_bars(location):
            unpack(model)
    if (kind := cache_type(model.config)) is not None:
        round_cache(model, kind)
    return move(model, device).eval()


def task_of(config: PretrainedConfig) -> Task:
    """What a model predicts; transformers would load an encoder as a causal model that sees the future."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if any(name.endswith(CLASSIFIER) for name in config.architectures or ()):
        return "classification"
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return "masked_lm" if is_encoder else "causal_lm"


def another_task(location: str, kind: str, task: Task) -> InputError:
    """What to raise for a model of a ``model_type`` whose task is not the one that is wanted."""
    what = {"masked_lm": "an encoder, which predicts masked tokens", "classification": "a classifier of texts"}
    return InputError(
        f"{location}: {kind} is {what.get(task, 'a causal language model')}; distill trains and measures causal "
        "language models only so far, and exports others to onnx"
    )


def move(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """``model.to(device)``, whose type transformers hides from type checkers."""
    return model.to(device)  # type: ignore[arg-type]


def low_bit_scheme(config: PretrainedConfig) -> bool:
    """Whether a model's file holds low-bit weights, which transformers can only run after widening them."""
    return getattr(config, "quantization_config", None) is not None


def new_model(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """A causal language model of this config with random weights, the same for the same seed; fp32, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the GPU's as well
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def empty_model(config: PretrainedConfig, task: str = "causal_lm") -> PreTrainedModel:
    """A model of this config on the device "meta": class and shapes, no numbers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    quiet_transformers()
    build = AutoModelForCausalLM if task == "causal_lm" else AutoModelForMaskedLM
    with torch.device("meta"):
        model: PreTrainedModel = build.from_config(config)
    return model.eval()


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
    """A config from ``model_type`` and its keys; a key that the architecture does not know is a mistake.

    Raises:
        InputError: unknown ``model_type`` or key, or values that the architecture refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

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
        names.add("rope_theta")  # where older configs, and most people, write it
    for key in rest:
        if key not in names:
            raise InputError(f"config: {model_type} has no key {key!r}{suggest(key, names)}")
    for key, value in rest.items():
        hint: Any = type(known).__annotations__.get(key)
        kinds = get_args(hint) or (hint,)
        if type(value) is int and float in kinds and int not in kinds:  # a recipe does not tell 30.0 from 30
            rest[key] = float(value)
    try:
        return AutoConfig.for_model(model_type, **rest)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"config: {model_type} refuses these values ({' '.join(str(error).split())})") from error


def licence_of(location: str) -> str | None:
    """The licence that a model's card states (``license:`` of README.md, in its folder or on the Hub), or None."""
    from huggingface_hub import ModelCard, hf_hub_download

    card = Path(location) / "README.md"
    if not Path(location).is_dir():
        try:
            card = Path(hf_hub_download(location, "README.md"))
        except Exception:  # offline, no card, no such model: whatever the reason, the licence is not known
            return None
    if not card.is_file():
        return None
    licence = ModelCard.load(card).data.to_dict().get("license")
    return str(licence) if licence else None
