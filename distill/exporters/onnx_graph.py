"""Export of a model to an ONNX graph with dynamic batch and sequence length, and its quantization by ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.core.errors import DistillError, InputError
from distill.exporters.onnx_names import DATA, PAST, PRESENT, inputs_of
from distill.quantization.fake_quant import unquantized

# a protobuf file is limited to 2 GB; larger weights are stored in a second file
EXTERNAL_ABOVE_BYTES = 1_500_000_000


def write_graph(model: PreTrainedModel, file: Path) -> None:
    """Export a model with dynamic batch and sequence length, from tokens to logits.

    Raises:
        InputError: torch cannot export it.
    """

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
            more = {"use_cache": False} if token_type_ids is None else {"token_type_ids": token_type_ids}
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **more).logits

    # more than one row and token, because the tracer specialises dimensions of size 1
    ids = torch.arange(24).remainder(model.config.get_text_config().vocab_size).view(2, 12)
    names = inputs_of(model.config)
    inputs = dict(zip(names, (ids, torch.ones_like(ids), torch.zeros_like(ids)), strict=False))
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    _trace(model, Logits(), inputs, dict.fromkeys(names, free), names, ["logits"], file)


def write_decoder(model: PreTrainedModel, file: Path) -> None:
    """Export a decoder whose KV cache is an input and output; the cache may be empty.

    Inputs are ``input_ids`` [batch, sequence], ``attention_mask`` [batch, past + sequence] and, per layer,
    ``past_key_values.N.key`` and ``.value``, [batch, kv_heads, past, head_dim]. Outputs are ``logits`` and, per layer,
    ``present.N.key`` and ``.value``, [batch, kv_heads, past + sequence, head_dim].

    Raises:
        InputError: torch cannot export it, or the model's cache is not a KV cache.
    """

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
            cache = DynamicCache(ddp_cache_data=list(past))
            places = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past[0][0].shape[2] :]
            made: Any = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
            )
            return made.logits, [(layer.keys, layer.values) for layer in made.past_key_values.layers]

    rows, num_past, num_new = 2, 7, 5  # all different and none of them 1, as above
    ids = torch.arange(rows * num_new).remainder(model.config.get_text_config().vocab_size).view(rows, num_new)
    past = _past(model, rows, num_past)
    inputs = {"input_ids": ids, "attention_mask": ids.new_ones(rows, num_past + num_new), "past": past}
    of_ids = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    of_past = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": of_ids, "attention_mask": of_ids, "past": [(of_past, of_past)] * len(past)}
    tensors = [f"{layer}.{part}" for layer in range(len(past)) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *(PAST + tensor for tensor in tensors)]
    _trace(model, Step(), inputs, shapes, names, ["logits", *(PRESENT + tensor for tensor in tensors)], file)


def _past(model: PreTrainedModel, rows: int, num_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer for ``num_tokens`` tokens, [batch, kv_heads, past, head_dim] each.

    Raises:
        InputError: the model's cache is not a KV cache.
    """
    ids = torch.zeros(rows, num_tokens, dtype=torch.long, device=model.device)
    with torch.no_grad():  # DynamicCache() without the config, so that it is not limited to a sliding window
        made: Any = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    layers = getattr(getattr(made, "past_key_values", None), "layers", [])
    kept: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not kept or any(key is None or value is None for key, value in kept):
        raise InputError(
            f"{model.config.model_type}: the model's cache has other tensors than keys and values; set "
            "keys_and_values: "
            "recomputed"
        )
    return kept


def _trace(
    model: PreTrainedModel, wrapped: Any, inputs: Any, shapes: Any, names: list[str], outputs: list[str], file: Path
) -> None:
    """Export ``wrapped`` with example ``inputs`` and dynamic ``shapes`` to ``file``."""
    try:
        with unquantized(model):  # ONNX Runtime does not quantize keys and values
            program = torch.onnx.export(
                wrapped.eval(),
                (),
                kwargs=inputs,
                dynamo=True,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=shapes,
                opset_version=18,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise InputError(
            f"{model.config.model_type}: torch cannot export this model to ONNX ({_root(error)}); choose another target"
        ) from error
    assert program is not None
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    program.save(str(file), external_data=num_bytes > EXTERNAL_ABOVE_BYTES)


def _root(error: BaseException) -> str:
    """First line of the original error, which torch wraps in errors of its exporter's steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def num_layers(model: PreTrainedModel) -> int:
    """Number of linear layers (including GPT-2's Conv1D) without the output head."""
    return sum(isinstance(module, torch.nn.Linear | Conv1D) for module in model.modules()) - 1


def quantize_graph(plain: Path, file: Path, num_layers: int) -> None:
    """Round every linear layer except the output head, which may be tied to the embeddings, and no lookup.

    Raises:
        DistillError: ONNX Runtime did not round all of them.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(str(plain), load_external_data=False).graph
    last, lookups = _last_product(graph), [node.name for node in graph.node if node.op_type == "Gather"]
    quantize_dynamic(
        plain,
        file,
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[*lookups, last, f"{last}_MatMul"],  # ONNX Runtime splits a Gemm into MatMul and Add
        use_external_data_format=plain.with_name(DATA).is_file(),
    )
    rounded = onnx.load(str(file), load_external_data=False).graph
    found = sum(node.op_type == "MatMulInteger" for node in rounded.node)
    if found != num_layers:
        raise DistillError(f"{file}: ONNX Runtime rounded {found} of {num_layers} linear layers; set weights: float32")


def _last_product(graph: Any) -> str:
    """Name of the matrix multiplication that computes the logits, before a bias or scaling."""
    makers = {output: node for node in graph.node for output in node.output}
    node = makers["logits"]
    while node.op_type not in ("MatMul", "Gemm"):
        node = makers[next(name for name in node.input if name in makers)]
    return str(node.name)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the context, suppress warnings of the exporters, which concern unused operators; errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
