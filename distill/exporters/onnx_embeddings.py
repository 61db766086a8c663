"""Embeddings and output head of an ONNX graph as 8-bit codes, one copy for both where they are tied.

    lookup   Gather(codes) -> float, minus 128, times Gather(scales)        standard operators
    head     MatMulNBits(hidden, codes, scales)                             ONNX Runtime's own, with 8 bits

``MatMulNBits`` reads the rows of the vocabulary as the lookup does, so both share one copy. Its product is computed in
float32, with the values of the codes.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (com.microsoft.MatMulNBits).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import PreTrainedModel

from distill.core.errors import DistillError
from distill.exporters.onnx_names import DATA
from distill.quantization.base import Codes
from distill.quantization.int8_channel import Int8Channel

WIDEST_BLOCK = 256
"""Largest block of a row with one scale; ``MatMulNBits`` takes powers of two from 16 on."""


def end_names(model: PreTrainedModel) -> list[str]:
    """Names of the weights of the input embeddings and of the output head, if the model has one; a tied weight once."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [id(end.weight) for end in ends if end is not None]
    return [name for name, parameter in model.named_parameters() if id(parameter) in weights]


def round_ends(model: PreTrainedModel, stored: dict[str, Codes], file: Path) -> int:
    """Replace the float weights of embeddings and head in a graph by codes, in place.

    Args:
        model: whose graph it is, in float32.
        stored: name of a weight -> its codes, as trained; a weight that is not in it, or whose codes ONNX Runtime's
            operator does not take (zero points, floats, odd blocks), is rounded to int8 per row.
        file: the graph.

    Returns:
        Number of weights that were stored from trained codes.

    Raises:
        DistillError: the graph does not look up the model's embeddings, or does not multiply by its head.
    """
    proto = onnx.load(str(file))
    graph = proto.graph
    parameters = dict(model.named_parameters())
    head = model.get_output_embeddings()
    written: set[str] = set()
    for name in end_names(model):
        weight = parameters[name].detach()
        trained = stored.get(name)
        is_stored = trained is not None and _is_taken(trained)
        codes = trained if trained is not None and is_stored else Int8Channel().quantize(weight)
        _add_codes(graph, name, codes)
        array = weight.numpy()
        found = _replace_lookups(graph, name, array)
        if head is not None and head.weight is parameters[name]:
            found += _replace_products(graph, name, array)
        if not found:
            raise DistillError(f"{file}: no operator reads {name}; set embeddings: float32")
        if is_stored:
            written.add(name)
    _remove_unused(graph)
    if not any(domain.domain == "com.microsoft" for domain in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    external = file.with_name(DATA)
    is_large = external.is_file()
    external.unlink(missing_ok=True)
    onnx.save(proto, str(file), save_as_external_data=is_large, location=DATA if is_large else None)
    return len(written)


def _is_taken(codes: Codes) -> bool:
    """Whether ``MatMulNBits`` takes the codes: signed 8-bit integers about zero, in blocks that 16 divides."""
    block = codes.values.shape[-1] // codes.scale.shape[-1]
    fits = codes.scale.shape[-1] == 1 or block % 16 == 0
    return codes.zero_point is None and codes.values.dtype == torch.int8 and fits


def _add_codes(graph: Any, name: str, codes: Codes) -> None:
    """Add ``name.codes``, uint8 [vocabulary, blocks, block], and ``name.scales``, float32 [vocabulary, blocks]."""
    values, scale = codes.values.numpy(), codes.scale.float().numpy()
    rows, width = values.shape
    block = width // scale.shape[1]
    if block > WIDEST_BLOCK or block & (block - 1):  # repeated for blocks that the operator takes, the last one padded
        each = next(size for size in (256, 128, 64, 32) if width % size == 0 or size == 32)
        if scale.shape[1] > 1:
            each = next(size for size in (256, 128, 64, 32, 16) if block % size == 0)
        padded = -(-width // each) * each
        values = numpy.pad(values, ((0, 0), (0, padded - width)))
        scale, block = numpy.repeat(scale, padded // each // scale.shape[1], axis=1), each
    shifted = (values.astype(numpy.int16) + 128).astype(numpy.uint8).reshape(rows, -1, block)
    graph.initializer.append(numpy_helper.from_array(shifted, f"{name}.codes"))
    graph.initializer.append(numpy_helper.from_array(numpy.ascontiguousarray(scale, numpy.float32), f"{name}.scales"))


def _shape_of(graph: Any, name: str) -> list[int]:
    return next(list(tensor.dims) for tensor in graph.initializer if tensor.name == name)


def _holding(graph: Any, array: numpy.ndarray) -> set[str]:
    """Names of the initializers with these values."""
    return {
        tensor.name
        for tensor in graph.initializer
        if list(tensor.dims) == list(array.shape)
        and tensor.data_type == TensorProto.FLOAT
        and numpy.array_equal(numpy_helper.to_array(tensor), array)
    }


def _replace_lookups(graph: Any, name: str, array: numpy.ndarray) -> int:
    """Make every lookup in a weight read its codes; the number of them."""
    names, width = _holding(graph, array), array.shape[1]
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in names]
    padded = int(numpy.prod(_shape_of(graph, f"{name}.codes")[1:]))
    for node in lookups:
        first, out = f"{node.name}.quantized", node.output[0]
        made = [
            helper.make_node("Gather", [f"{name}.codes", node.input[1]], [f"{first}.codes"], axis=0),
            helper.make_node("Cast", [f"{first}.codes"], [f"{first}.float"], to=TensorProto.FLOAT),
            helper.make_node("Sub", [f"{first}.float", f"{first}.middle"], [f"{first}.signed"]),
            helper.make_node("Gather", [f"{name}.scales", node.input[1]], [f"{first}.scales"], axis=0),
            helper.make_node("Unsqueeze", [f"{first}.scales", f"{first}.last"], [f"{first}.column"]),
            helper.make_node("Mul", [f"{first}.signed", f"{first}.column"], [f"{first}.blocks"]),
            # [batch, sequence, blocks, block] -> [batch, sequence, width]
            helper.make_node("Reshape", [f"{first}.blocks", f"{first}.shape"], [f"{first}.rows"]),
            helper.make_node("Slice", [f"{first}.rows", f"{first}.zero", f"{first}.width", f"{first}.last"], [out]),
        ]
        constants = {
            "middle": numpy.array(128, numpy.float32),
            "last": numpy.array([-1]),
            "shape": numpy.array([0, 0, padded]),
            "zero": numpy.array([0]),
            "width": numpy.array([width]),
        }
        if padded == width:
            made.pop()
            made[-1].output[0] = out
            del constants["zero"], constants["width"]
        graph.initializer.extend(numpy_helper.from_array(value, f"{first}.{key}") for key, value in constants.items())
        _replace(graph, node, made)
    return len(lookups)


def _replace_products(graph: Any, name: str, array: numpy.ndarray) -> int:
    """Make every product with a transposed weight read its codes; the number of them."""
    names = _holding(graph, array.T)  # transposed when the graph was made
    direct = _holding(graph, array)
    turned = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in direct]
    names |= {node.output[0] for node in turned}  # or when it runs
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in names]
    for node in products:
        made = helper.make_node(
            "MatMulNBits",
            [node.input[0], f"{name}.codes", f"{name}.scales"],
            [node.output[0]],
            name=node.name,
            domain="com.microsoft",
            K=array.shape[1],
            N=array.shape[0],
            bits=8,
            block_size=_shape_of(graph, f"{name}.codes")[2],
        )
        _replace(graph, node, [made])
    read = {each for node in graph.node for each in node.input}
    for node in turned:
        if node.output[0] not in read:
            graph.node.remove(node)
    return len(products)


def _replace(graph: Any, node: Any, made: list[Any]) -> None:
    """Put nodes in the place of one, as a graph's nodes are in the order in which they are computed."""
    index = list(graph.node).index(node)
    graph.node.remove(node)
    for offset, new in enumerate(made):
        graph.node.insert(index + offset, new)


def _remove_unused(graph: Any) -> None:
    """Remove the initializers that no node reads."""
    read = {name for node in graph.node for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unused:
        graph.initializer.remove(tensor)
