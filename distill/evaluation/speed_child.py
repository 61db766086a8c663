"""What runs inside the measuring process of ``speed.py``; imported once, by the server that it is forked from."""

from __future__ import annotations

import inspect
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from distill.core.quiet import quiet_torchao

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.evaluation.speed_settings import SpeedSettings


def measure(folder: str, settings: SpeedSettings) -> dict[str, Any]:
    """The figures of :class:`distill.evaluation.speed.Speed`, measured in this process."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    quiet_torchao()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    start = _peak_memory(device)
    model = _model(folder, settings, device)
    prefill, steps = _times(model, settings, device)
    peak = _peak_memory(device)
    prefill_p50, step_p50 = _quantile(prefill, 0.5), _quantile(steps, 0.5)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "prefill_ms_p50": 1e3 * prefill_p50,
        "prefill_ms_p90": 1e3 * _quantile(prefill, 0.9),
        "prefill_tokens_per_s": settings.batch * settings.prompt_tokens / prefill_p50,
        "decode_tokens_per_s_p50": settings.batch / step_p50,
        "decode_tokens_per_s_p90": settings.batch / _quantile(steps, 0.9),
        "peak_memory_bytes": peak,
        "memory_above_start_bytes": max(0, peak - start),
    }


def _model(folder: str, settings: SpeedSettings, device: torch.device) -> Any:
    if settings.weights == "stored":
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=settings.dtype)
        return model.to(device).eval()
    config = AutoConfig.from_pretrained(folder)
    dtype = config.dtype or torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with device:  # drawn where they are used
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.inference_mode()
def _times(model: PreTrainedModel, settings: SpeedSettings, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of each prefill and of each decode step, all repeats together; the first round only warms up."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (settings.batch, settings.prompt_tokens), generator=generator).to(device)
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1  # an engine computes the last position's logits only
    prefill: list[float] = []
    steps: list[float] = []
    for round_ in range(settings.repeats + 1):
        output, seconds = _timed(partial(model, prompt, **options), device)
        times = [seconds]
        for _step in range(settings.new_tokens):
            token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            output, seconds = _timed(partial(model, token, past_key_values=cache, **options), device)
            times.append(seconds)
        if round_:
            prefill.append(times[0])
            steps.extend(times[1:])
    return prefill, steps


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """A call's result and its wall-clock seconds; a device that works ahead is waited for."""
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def _peak_memory(device: torch.device) -> int:
    """Bytes: most allocated on a CUDA device, else the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes


def _quantile(values: list[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))
