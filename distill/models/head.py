"""A model split into body and output head, where the head includes all scaling of the logits.

    hidden = body(input_ids)                                                            [batch, sequence, hidden]
    logits = head(hidden) * multiply / divide                                           [batch, sequence, vocabulary]
    logits = softcap * tanh(logits / softcap)                                           if the config has a soft-cap

The head is the last linear layer. What another model than a causal one computes between its body and this layer (the
transform of a head for masked tokens, the pooling and dropout of a classifier) belongs to the body here:

    masked_lm, token_classification   hidden [batch, sequence, hidden]      logits of each token
    classification, regression        hidden [batch, 1, hidden]             logits of each text
    embedding                         hidden [batch, 1, hidden]             the embedding of each text; no head

Losses, teacher and evaluation call body and head separately, so that logits exist only for a chunk of tokens. Soft-cap
and scales are read from the config; :func:`check_head` compares the result with the model's own forward before
training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.func import functional_call
from transformers import PreTrainedModel, masking_utils

from distill.core.batch import known_inputs
from distill.core.errors import InputError
from distill.losses.head_losses import Head
from distill.models.head_names import head_of
from distill.quantization.fake_quant import FakeQuantLinear


def hidden_states(model: PreTrainedModel, input_ids: Tensor, **arguments: Tensor) -> Tensor:
    """What the output head reads: the last hidden states after the final norm; see the top of this file.

    Args:
        model: a model of transformers.
        input_ids: [batch, sequence].
        arguments: other inputs of the body, such as ``attention_mask`` or ``position_ids`` [batch, sequence]. Token
            types are left out for a model that has none.

    Returns:
        [batch, sequence, hidden], or [batch, 1, hidden] for a head that reads whole texts.

    Raises:
        InputError: a model without a head, for which no pooling was chosen.
    """
    if (kind := head_of(model)) != "causal_lm":
        return _states_of_encoder(model, kind, {"input_ids": input_ids, **arguments})
    with _no_question(restarts="position_ids" in arguments):
        return model.base_model(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state


def _states_of_encoder(model: PreTrainedModel, kind: str, inputs: dict[str, Tensor]) -> Tensor:
    """:func:`hidden_states` of a model that does not predict the next token."""
    inputs = known_inputs(model, inputs)
    if kind == "embedding":
        states = model(**inputs).last_hidden_state  # [batch, sequence, hidden]
        return pooling_of(model)(states, inputs.get("attention_mask")).unsqueeze(1)
    with _passing_on(_head_module(model)):
        states = model(**inputs).logits  # what the last layer was to read
    return states if states.ndim > 2 else states.unsqueeze(1)


@contextmanager
def _passing_on(module: torch.nn.Module) -> Iterator[None]:
    """Within the ``with`` block, a module returns its input, so that a model's own forward ends before it."""
    module.forward = _same
    try:
        yield
    finally:
        del module.forward  # the method of its class is seen again


def _same(states: Tensor) -> Tensor:
    return states


@dataclass(frozen=True)
class Pooling:
    """How hidden states become the embedding of a text.

    Attributes:
        kind: the mean over the tokens, or the state of the first one.
        normalize: whether embeddings are scaled to length 1.
    """

    kind: str
    normalize: bool

    def __call__(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Embeddings, [batch, hidden].

        Args:
            states: [batch, sequence, hidden].
            mask: [batch, sequence], 0 for padding; None: all tokens count.
        """
        if self.kind == "cls":
            pooled = states[:, 0]
        elif mask is None:
            pooled = states.mean(1)
        else:
            weights = mask.unsqueeze(-1).to(states.dtype)  # [batch, sequence, 1]
            pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


def set_pooling(model: PreTrainedModel, pooling: Pooling) -> PreTrainedModel:
    """Choose how a model without a head makes embeddings; the model itself."""
    cast(Any, model).distill_pooling = pooling
    return model


def freeze_pooler(model: PreTrainedModel) -> None:
    """Freeze the layer of a body that no embedding reads, as a weight without a gradient stops several processes."""
    pooler = getattr(model, "pooler", None)
    if pooling_if_any(model) is not None and isinstance(pooler, torch.nn.Module):
        pooler.requires_grad_(False)


def pooling_if_any(model: PreTrainedModel) -> Pooling | None:
    """What :func:`set_pooling` chose; None where nothing was chosen."""
    found: Pooling | None = getattr(model, "distill_pooling", None)
    return found


def pooling_of(model: PreTrainedModel) -> Pooling:
    """What :func:`set_pooling` chose.

    Raises:
        InputError: nothing was chosen.
    """
    found = pooling_if_any(model)
    if found is None:
        raise InputError(
            f"{type(model).__name__} has no output head, so it has no logits to train on; use a causal language model, "
            "or set task in the recipe"
        )
    return found


@contextmanager
def _no_question(*, restarts: bool) -> Iterator[None]:
    """Tell transformers whether position ids restart: its own check reads a value from the GPU, and the CPU waits.

    Private API of transformers: without position ids a model counts from 0, and no mask is needed that keeps documents
    apart; with them it is made on a GPU without asking whether it is needed (the training module leaves position ids
    out that never restart).
    """
    ask = masking_utils.find_packed_sequence_indices

    def answer(position_ids: Tensor) -> Tensor | None:
        if not restarts:
            return None
        if position_ids.device.type != "cuda":
            return ask(position_ids)
        return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)

    masking_utils.find_packed_sequence_indices = answer
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = ask


def output_head(model: PreTrainedModel) -> Head:
    """The model's output head: it calls the model's own module and applies soft-cap and scales.

    Raises:
        InputError: the model has no output embeddings.
    """
    if head_of(model) == "embedding":
        pooling_of(model)
        return Head(_same)
    return _scaled(_head_module(model), _scales(model))


def head_copy(model: PreTrainedModel, device: torch.device) -> Head:
    """A frozen copy of the model's head on another device; it moves its input to that device.

    Raises:
        InputError: the model has no output embeddings.
    """
    if head_of(model) == "embedding":
        return Head(lambda hidden: hidden.to(device))
    copied = _scaled(deepcopy(_head_module(model)).to(device).requires_grad_(False), _scales(model))
    return Head(lambda hidden: copied.logits(hidden.to(device)), copied.parameters)


def _head_module(model: PreTrainedModel) -> torch.nn.Module:
    """The output embeddings.

    Raises:
        InputError: the model has no output embeddings.
    """
    module = model.get_output_embeddings() if head_of(model) in ("causal_lm", "masked_lm") else _classifier(model)
    if module is None:
        raise InputError(
            f"{type(model).__name__} has no output head, so it has no logits to train on; use a causal language model"
        )
    return module


def _classifier(model: PreTrainedModel) -> torch.nn.Module | None:
    """The last linear layer of a head for classes; :func:`check_head` compares it with the model's own forward."""
    head = getattr(model, "classifier", None) or getattr(model, "score", None)
    if head is None:
        return None
    matrices = [module for module in head.modules() if getattr(module, "weight", None) is not None]
    return matrices[-1] if matrices else None


def _scales(model: PreTrainedModel) -> dict[str, float]:
    """The scaling of the logits that the config specifies."""
    config = model.config
    return {
        "softcap": getattr(config, "final_logit_softcapping", None) or 0.0,
        "multiply": getattr(config, "logit_scale", None) or 1.0,
        "divide": getattr(config, "logits_scaling", None) or 1.0,
    }


def _scaled(module: torch.nn.Module, scales: dict[str, float]) -> Head:
    """The head of this module. Without scaling, it calls the module directly, so that losses can see a plain layer."""
    softcap, factor = scales["softcap"], scales["multiply"] / scales["divide"]
    call: Callable[[Tensor], Tensor]
    if _rounds_its_weight(module):
        call, parameters = _rounded_once(module)
    elif any(isinstance(p, DTensor) for p in module.parameters()):
        call, parameters = _gathered(module)
    else:
        call, parameters = module, tuple(module.parameters())
    if factor == 1.0 and not softcap:
        return Head(call, parameters)

    def logits(hidden: Tensor) -> Tensor:
        out = call(hidden)  # [tokens, vocabulary]
        if factor != 1.0:
            out = out * factor
        if softcap:
            out = torch.tanh(out / softcap) * softcap
        return out

    return Head(logits, parameters)


def _gathered(module: torch.nn.Module) -> tuple[Callable[[Tensor], Tensor], tuple[Any, ...]]:
    """(function that calls a sharded head with gathered weights, the gathered weights), for one micro-batch.

    The gradient of the shards is the mean over the ranks, as for all other weights.
    """
    gathered = {name: _gather(p) for name, p in module.named_parameters()}  # [vocabulary, hidden], [vocabulary]
    if type(module) is torch.nn.Linear:  # stays a linear layer, whose product the losses compute in place
        plain, own = copy(module), cast(dict[str, Any], module._parameters)
        plain._parameters = own | gathered  # its bias may be None
        return plain, tuple(gathered.values())
    return lambda hidden: functional_call(module, gathered, (hidden,)), tuple(gathered.values())


def _rounds_its_weight(module: torch.nn.Module) -> TypeGuard[FakeQuantLinear]:
    """Whether the head is a linear layer on a fake-quantized weight, and nothing else: no inputs on a grid, no hook."""
    if not isinstance(module, FakeQuantLinear) or module.inputs is not None:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def _rounded_once(module: FakeQuantLinear) -> tuple[torch.nn.Linear, tuple[Any, ...]]:
    """(plain linear layer with the fake-quantized weight, its weight and bias), for one micro-batch.

    The weight is quantized once, and not in every chunk of tokens, and the losses see a plain layer, whose product they
    compute in place. Its gradient flows through the quantizer to the weight, which tied embeddings share.
    """
    own = {name: _gather(p) for name, p in module.named_parameters()}
    weight = module.effective(own["weight"], own.get("log_scale"))  # [vocabulary, hidden]
    with torch.device("meta"):
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    cast(Any, plain)._parameters = {"weight": weight, "bias": own.get("bias")}
    return plain, tuple(plain.parameters())


def _gather(parameter: Any) -> Tensor:
    """The full parameter, gathered from all ranks; its gradient flows back to this rank's shard."""
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()])  # the full gradient is the sum over the ranks
    if not full.requires_grad:
        return full
    full.register_hook(lambda gradient: gradient / mesh.size())
    # The losses call torch.autograd.grad with respect to the head's weights. With respect to ``full``, this would call
    # the hook, and the backward from ``full`` to the shards would call it again and divide twice. Hence a view.
    return full.view_as(full)


def save_head(model: PreTrainedModel, file: Path) -> None:
    """Write a model's head and its scales to a safetensors file, for :func:`load_head`.

    Raises:
        InputError: the head is not one linear layer.
    """
    module = model.get_output_embeddings()
    if not isinstance(module, torch.nn.Linear):
        raise InputError(
            f"{type(model).__name__}: the output head is not a linear layer, so it cannot be stored separately"
        )
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    save_file(tensors, file, metadata={"scales": json.dumps(_scales(model))})


def load_head(file: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Head:
    """Load a frozen head, without its model, that :func:`save_head` has written.

    Args:
        file: the safetensors file.
        dtype: of the weights in memory; None: that of the file.
        device: of the weights.
    """
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
    """Check on four tokens that body and head give the same logits as the model's own forward.

    A model on the device "meta" is not checked: with several processes, the one that loaded the weights checks it.

    Raises:
        InputError: the logits differ, because the architecture has another operation between body and head.
    """
    if model.device.type == "meta" or head_of(model) == "embedding":
        return
    ids = torch.arange(4, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    caches = {"use_cache": False} if head_of(model) == "causal_lm" else {}
    try:
        theirs = model(input_ids=ids, **caches).logits.float()
        ours = output_head(model).logits(hidden_states(model, ids)).float()  # [1, 4, vocabulary], or [1, 1, classes]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # sizes that its config class lets pass
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{type(model).__name__}: cannot compute four tokens ({reason}); the sizes in its config do not fit each "
            "other"
        ) from error
    finally:
        model.train(training)
    if ours.numel() != theirs.numel():
        raise InputError(f"{type(model).__name__}: no output head was found that makes its logits; use another model")
    difference = (ours - theirs.view_as(ours)).abs().max().item()
    if not difference <= 1e-3 * max(1.0, theirs.abs().max().item()):
        raise InputError(
            f"{type(model).__name__} has an operation between its last hidden states and its logits that distill does "
            f"not support (the logits differ by {difference:.3g}); use a model of another architecture"
        )
