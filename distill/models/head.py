"""A causal model taken apart at its last hidden state: the body, and the head with all that scales its logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.tensor import DTensor, Partial
from torch.func import functional_call

from distill.core.errors import InputError
from distill.losses.head import Head

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def hidden_states(model: PreTrainedModel, input_ids: Tensor, **arguments: Tensor) -> Tensor:
    """Final hidden states, after the last norm.

    Args:
        model: a causal language model.
        input_ids: [batch, sequence].
        arguments: what else the body takes, such as ``position_ids`` [batch, sequence].

    Returns:
        [batch, sequence, hidden].
    """
    return model.base_model(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state


def output_head(model: PreTrainedModel) -> Head:
    """The model's head as a callable that calls its own module, with soft-cap and scales applied.

    Raises:
        InputError: the model has no output embeddings.
    """
    return _scaled(_head_module(model), _scales(model))


def head_copy(model: PreTrainedModel, device: torch.device) -> Head:
    """A frozen copy of the model's head on another device; it fetches the hidden states that it is given.

    Raises:
        InputError: the model has no output embeddings.
    """
    whole = _scaled(deepcopy(_head_module(model)).to(device).requires_grad_(False), _scales(model))
    return Head(lambda hidden: whole.logits(hidden.to(device)), whole.parameters)


def _head_module(model: PreTrainedModel) -> torch.nn.Module:
    """The output embeddings.

    Raises:
        InputError: the model has no output embeddings.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise InputError(f"{type(model).__name__} has no output head, so it gives no logits to learn from")
    return module


def _scales(model: PreTrainedModel) -> dict[str, float]:
    """What the config says is done to the head's output."""
    config = model.config
    return {
        "softcap": getattr(config, "final_logit_softcapping", None) or 0.0,
        "multiply": getattr(config, "logit_scale", None) or 1.0,
        "divide": getattr(config, "logits_scaling", None) or 1.0,
    }


def _scaled(module: torch.nn.Module, scales: dict[str, float]) -> Head:
    softcap, factor = scales["softcap"], scales["multiply"] / scales["divide"]
    shared_out = any(isinstance(p, DTensor) for p in module.parameters())
    call, parameters = _gathered(module) if shared_out else (module, tuple(module.parameters()))
    if factor == 1.0 and not softcap:
        return Head(call, parameters)

    def logits(hidden: Tensor) -> Tensor:
        out = call(hidden)
        if factor != 1.0:
            out = out * factor
        if softcap:
            out = torch.tanh(out / softcap) * softcap
        return out

    return Head(logits, parameters)


def _gathered(module: torch.nn.Module) -> tuple[Callable[[Tensor], Tensor], tuple[Any, ...]]:
    """A head whose weights are shared out among ranks, with the whole of them, for one micro-batch.

    The gradient goes back to the shards as the mean over the ranks, like those of all other weights.
    """
    wholes = {name: _gather(p) for name, p in module.named_parameters()}
    if type(module) is torch.nn.Linear:  # it stays one, so that the losses multiply by it in place
        plain, own = copy(module), cast(dict[str, Any], module._parameters)
        plain._parameters = own | wholes  # its bias may be None
        return plain, tuple(wholes.values())
    return lambda hidden: functional_call(module, wholes, (hidden,)), tuple(wholes.values())


def _gather(parameter: Any) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()])
    if not full.requires_grad:
        return full
    full.register_hook(lambda gradient: gradient / mesh.size())
    # a loss that asks for the gradient of the head alone must not meet the hook: it would be called there and once more
    # on the way to the shards
    return full.view_as(full)


def save_head(model: PreTrainedModel, file: Path) -> None:
    """Write a model's head and its scales to a safetensors file, for :func:`load_head`.

    Raises:
        InputError: the head is not one linear layer.
    """
    from safetensors.torch import save_file

    module = model.get_output_embeddings()
    if not isinstance(module, torch.nn.Linear):
        raise InputError(f"{type(model).__name__}: its output head is no linear layer, so it cannot be kept alone")
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    save_file(tensors, file, metadata={"scales": json.dumps(_scales(model))})


def load_head(file: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Head:
    """A frozen head alone, as :func:`save_head` wrote it.

    Args:
        file: the safetensors file.
        dtype: of the weights in memory; None is that of the file.
        device: where to.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        scales = json.loads(opened.metadata()["scales"])
        tensors = {name: opened.get_tensor(name).to(device, dtype) for name in opened.keys()}  # noqa: SIM118
    rows, columns = tensors["weight"].shape
    with torch.device("meta"):
        module = torch.nn.Linear(columns, rows, bias="bias" in tensors)
    module.load_state_dict(tensors, assign=True)
    return _scaled(module.requires_grad_(False), scales)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Hold body + head against the model's own forward on four tokens, so that no architecture is trained wrongly.

    A model without numbers passes: of several processes the one that has read them finds out.

    Raises:
        InputError: they differ: the architecture does something between the two that we do not know.
    """
    if model.device.type == "meta":
        return
    ids = torch.arange(4, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    ours = output_head(model).logits(hidden_states(model, ids)).float()
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    difference = (ours - theirs).abs().max().item()
    if not difference <= 1e-3 * max(1.0, theirs.abs().max().item()):
        raise InputError(
            f"{type(model).__name__} does something between its hidden states and its logits that distill does not "
            f"know (they differ by {difference:.3g}); this architecture cannot be trained here yet"
        )
