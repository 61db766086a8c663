"""A model traced into an ONNX graph of any batch and length, and its linear layers rounded by ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.errors import DistillError, InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FILE, DATA = "model.onnx", "model.onnx.data"
PAST, PRESENT = "past_key_values.", "present."
"""What names of a cache's tensors begin with, as it goes in and as it comes out: those that other tools look for."""
# a protobuf holds no more than 2 GB; larger weights lie in a file beside it
EXTERNAL_ABOVE_BYTES = 1_500_000_000


def inputs_of(config: Any) -> list[str]:
    """What a graph reads, each int64 [batch, sequence]: encoders of pairs of texts also which of the two it is."""
    segments = ["token_type_ids"] if getattr(config, "type_vocab_size", 0) > 1 else []
    return ["input_ids", "attention_mask", *segments]


def write_graph(model: PreTrainedModel, file: Path) -> None:
    """Trace a model into a graph of any batch and sequence length.

    Raises:
        InputError: torch cannot.
    """
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
            more = {"use_cache": False} if token_type_ids is None else {"token_type_ids": token_type_ids}
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **more).logits

    # neither one row nor one token, which a trace would take for constants
    ids = torch.arange(24).remainder(model.config.get_text_config().vocab_size).view(2, 12)
    names = inputs_of(model.config)
    inputs = dict(zip(names, (ids, torch.ones_like(ids), torch.zeros_like(ids)), strict=False))
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    _trace(model, Logits(), inputs, dict.fromkeys(names, free), names, ["logits"], file)


def write_decoder(model: PreTrainedModel, file: Path) -> None:
    """Trace a decoder that goes on from the keys and values of earlier tokens, of which there may be none.

    Inputs are ``input_ids`` [batch, sequence], ``attention_mask`` [batch, past + sequence] and, for each layer,
    ``past_key_values.N.key`` and ``.value``, [batch, kv_heads, past, head_dim]; outputs are ``logits`` and the same
    with the new tokens, ``present.N.key`` and ``.value``.

    Raises:
        InputError: torch cannot, or the model keeps something else than keys and values.
    """
    import torch
    from transformers import DynamicCache

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

    rows, num_past, num_new = 2, 7, 5  # none alike, and none of them 1: see above
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
    """Keys and values of each layer, as the model itself makes them.

    Raises:
        InputError: it makes something else.
    """
    import torch
    from transformers import DynamicCache

    ids = torch.zeros(rows, num_tokens, dtype=torch.long, device=model.device)
    with torch.no_grad():  # in a cache that is not told of the config, so that it cuts no window
        made: Any = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    layers = getattr(getattr(made, "past_key_values", None), "layers", [])
    kept: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not kept or any(key is None or value is None for key, value in kept):
        raise InputError(
            f"{model.config.model_type}: keeps something else than keys and values from token to token; set "
            "keys_and_values: recomputed"
        )
    return kept


def _trace(
    model: PreTrainedModel, wrapped: Any, inputs: Any, shapes: Any, names: list[str], outputs: list[str], file: Path
) -> None:
    """Write what ``wrapped`` computes of ``inputs``, with ``shapes`` of any size."""
    import torch

    from distill.quantization.fake_quant import unquantized

    try:
        with unquantized(model):  # ONNX Runtime keeps keys and values as they are
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
            f"{model.config.model_type}: torch cannot write this model as ONNX ({_root(error)}); choose another target"
        ) from error
    assert program is not None
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    program.save(str(file), external_data=num_bytes > EXTERNAL_ABOVE_BYTES)


def _root(error: BaseException) -> str:
    """What went wrong first, in a line: torch wraps it in the steps of its exporter and advice for its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def num_layers(model: PreTrainedModel) -> int:
    """Linear layers, GPT-2's among them, without the last one, which makes the logits."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return sum(isinstance(module, torch.nn.Linear | Conv1D) for module in model.modules()) - 1


def quantize_graph(plain: Path, file: Path, num_layers: int) -> None:
    """Round every linear layer but the last, which a tied model shares with its embeddings.

    Raises:
        DistillError: ONNX Runtime did not find all of them.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    last = _last_product(onnx.load(str(plain), load_external_data=False).graph)
    quantize_dynamic(
        plain,
        file,
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[last, f"{last}_MatMul"],  # as it takes a Gemm apart
        use_external_data_format=plain.with_name(DATA).is_file(),
    )
    rounded = onnx.load(str(file), load_external_data=False).graph
    found = sum(node.op_type == "MatMulInteger" for node in rounded.node)
    if found != num_layers:
        raise DistillError(f"{file}: ONNX Runtime rounded {found} linear layers of {num_layers}; set weights: float32")


def _last_product(graph: Any) -> str:
    """The name of the multiplication behind the logits; a bias may be added to it."""
    makers = {output: node for node in graph.node for output in node.output}
    node = makers["logits"]
    while node.op_type not in ("MatMul", "Gemm"):
        node = makers[next(name for name in node.input if name in makers)]
    return str(node.name)


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of the exporters (of operators and steps that are not used) stay out of our progress; errors raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
