"""The one place where models, configs and tokenizers from outside are loaded.

Code that lies beside them is never run, nobody is asked whether to run it, pickled weights are never opened, nothing is
fetched for a folder, and what the libraries raise becomes one line. A test refuses their loaders anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.errors import DistillError, InputError, MachineError
from distill.core.model_config import check_config
from distill.core.model_folder import check_folder, check_no_adapter
from distill.core.outside import is_folder, read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def config_from(location: str) -> PretrainedConfig:
    """The config of a model folder or Hub id.

    Raises:
        InputError: there is none, it is no config, or it asks for code from elsewhere.
    """
    import torch
    from transformers import AutoConfig

    if is_folder(location):
        check_no_adapter(Path(location))
        if not (Path(location) / "config.json").is_file():
            raise InputError(f"{location}: not a model folder (no config.json in it)")
    with _in_one_line(location, "config"):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            location, trust_remote_code=False, local_files_only=is_folder(location)
        )
        check_config(config.to_dict(), location)  # what came from the Hub was not seen before
        if not (config.dtype is None or (isinstance(config.dtype, torch.dtype) and config.dtype.is_floating_point)):
            raise InputError(f"{location}: its config's dtype is {config.dtype}, expected float32, bfloat16 or float16")
        for part in (config, config.get_text_config()):
            for chosen in (part._attn_implementation, part._experts_implementation):
                if "/" in str(chosen):  # a repository whose machine code would be downloaded and run
                    raise InputError(f"{location}: its config asks for code of {chosen}, which is not run; remove it")
    return config


def generation_config_from(location: str) -> GenerationConfig | None:
    """How a model folder or Hub id generates text; None where it does not say.

    Raises:
        InputError: it is no such config.
    """
    from transformers import GenerationConfig

    file = Path(location) / "generation_config.json"
    if is_folder(location) and not file.is_file():
        return None
    with _in_one_line(location, "generation config"):
        try:
            return GenerationConfig.from_pretrained(location, local_files_only=is_folder(location))
        except OSError:
            if is_folder(location):
                raise
            return None


def tokenizer_from(location: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id.

    Raises:
        InputError: there is none, or it cannot be loaded without code of its own.
    """
    from transformers import AutoTokenizer

    with _in_one_line(location, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location, trust_remote_code=False, local_files_only=is_folder(location), **_no_other_files(location)
        )
        tokenizer("a")  # some values of its config are first read here
    return tokenizer


def token_names(location: str) -> dict[int, str]:
    """Id -> token of those that a tokenizer's folder has beside its vocabulary, such as the ends of a text.

    Raises:
        InputError: ``tokenizer.json`` is damaged.
    """
    file = Path(location) / "tokenizer.json"
    added = read_json(file).get("added_tokens") if file.is_file() else None
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    return {
        e["id"]: e["content"] for e in entries if isinstance(e.get("id"), int) and isinstance(e.get("content"), str)
    }


def model_from(location: str, loader: Any, **arguments: Any) -> Any:
    """A model, from safetensors only.

    Args:
        location: folder or Hub id.
        loader: class of transformers, such as ``AutoModelForCausalLM``.
        arguments: for its ``from_pretrained``.

    Returns:
        What the loader returns: the model, and with ``output_loading_info`` also what did not fit.

    Raises:
        InputError: it cannot be loaded, or needs code of its own.
        MachineError: the memory is too small for it.
    """
    with _in_one_line(location, "model"):
        return loader.from_pretrained(
            location,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=is_folder(location),
            **arguments,
        )


def model_of(config: PretrainedConfig, loader: Any, **arguments: Any) -> PreTrainedModel:
    """A model with new weights; on the device "meta", where the caller has chosen it, with none.

    Args:
        config: from this module, or new.
        loader: class of transformers, such as ``AutoModelForCausalLM``.
        arguments: for its ``from_config``.

    Raises:
        InputError: the class cannot be built by the config, or needs code of its own.
        MachineError: the memory is too small for it.
    """
    with _in_one_line(config.name_or_path or "config", f"{config.model_type} model"):
        model: PreTrainedModel = loader.from_config(config, trust_remote_code=False, **arguments)
    return model


@contextmanager
def _in_one_line(location: str, what: str) -> Iterator[None]:
    """Turn all that a library may raise into one line: a damaged folder fails in as many ways as it can be damaged."""
    try:
        if is_folder(location):
            check_folder(Path(location))
        yield
    except DistillError:
        raise
    except MemoryError:
        raise MachineError(f"{location}: there is not enough memory for the {what}") from None
    except BaseException as error:
        # the libraries in Rust derive their panics from BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "can't allocate memory" in str(error):
            raise MachineError(f"{location}: there is not enough memory for the {what}") from error
        raise InputError(f"{location}: cannot load the {what} ({_reason(error)})") from error


def _no_other_files(location: str) -> dict[str, None]:
    """Arguments that keep a tokenizer from opening what its config names: its own files are known by their names."""
    file = Path(location) / "tokenizer_config.json"
    named = read_json(file) if file.is_file() else {}
    return {key: None for key, value in named.items() if key.endswith("_file") and isinstance(value, str)}


def _reason(error: BaseException) -> str:
    """The first line that says something, with the error's type where the line alone does not."""
    from safetensors import SafetensorError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # a line that ends in a colon only announces the next one
    reason = " ".join(lines[:2])[:300] if lines[0].endswith(":") else lines[0][:300]
    if isinstance(error, SafetensorError):
        return f"{reason}; its file is damaged: download or copy it again"
    if isinstance(error, OSError | ValueError | ImportError | RuntimeError) or reason == type(error).__name__:
        return reason
    return f"{type(error).__name__}: {reason}"
