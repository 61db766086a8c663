"""Embeddings and head of a graph as codes, on graphs of one lookup and one product, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.core.errors import DistillError
from distill.quantization import Q6K, Q80, Int8Channel, IntGroup
from distill.quantization.base import Codes, QuantizerSpec

for module in ("onnx", "onnxruntime"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install 'distill-lm[test]'")


class Ends(nn.Module):
    """Embeddings and a head, tied or not."""

    def __init__(self, width: int, is_tied: bool):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, width)
        self.head = nn.Linear(width, 48, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def write(model: Any, file: Path, *, folded: bool) -> None:
    """The graph of ``model``, its head transposed beforehand or by a node, as torch's exporter does either."""
    from onnx import TensorProto, helper, numpy_helper, save

    weight, head = model.embed.weight.detach().numpy(), model.head.weight.detach().numpy()
    tensors, right = {"embed.weight": weight}, "head.turned"
    nodes = [helper.make_node("Gather", ["embed.weight", "input_ids"], ["hidden"], name="lookup", axis=0)]
    if folded:
        tensors["head.turned"] = head.T.copy()
    else:
        source = "embed.weight" if model.head.weight is model.embed.weight else "head.weight"
        tensors[source] = head
        nodes.append(helper.make_node("Transpose", [source], [right], name="turn", perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["hidden", right], ["logits"], name="product"))
    graph = helper.make_graph(
        nodes,
        "ends",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 48])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)


def codes_of(model: Any, spec: QuantizerSpec) -> dict[str, Codes]:
    """Codes of both weights; the model computes with them from here on."""
    found = {name: spec.quantize(parameter) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(spec.dequantize(found[name]))
    return found


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    ("spec", "width"), [(Q80(), 64), (Q6K(), 256), (Int8Channel(), 60), (Int8Channel(), 96), (Int8Channel(), 512)]
)
def test_onnx_runtime_computes_with_the_trained_codes(
    spec: QuantizerSpec, width: int, is_tied: bool, folded: bool, tmp_path: Path
) -> None:
    import onnx
    import onnxruntime

    from distill.exporters.onnx_embeddings import round_ends

    model, file = Ends(width, is_tied), tmp_path / "model.onnx"
    codes = codes_of(model, spec)
    write(model, file, folded=folded)
    plain = file.stat().st_size
    assert round_ends(model, codes, file) == (1 if is_tied else 2)  # type: ignore[arg-type]
    ids = torch.randint(0, 48, (2, 5))
    (logits,) = onnxruntime.InferenceSession(file).run(["logits"], {"input_ids": ids.numpy()})
    exact = model.head(model.embed(ids)).detach()
    torch.testing.assert_close(torch.from_numpy(logits), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    graph = onnx.load(file).graph
    kinds = [tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 3]
    assert kinds == [onnx.TensorProto.UINT8] * (1 if is_tied else 2)
    assert [node.op_type for node in graph.node].count("MatMulNBits") == 1
    assert not any(node.op_type in ("Transpose", "MatMul") for node in graph.node)
    assert width < 256 or file.stat().st_size < plain * (0.6 if is_tied and not folded else 0.5)


@pytest.mark.parametrize("spec", [None, IntGroup(symmetry="asymmetric", bits=8, group_size=32), IntGroup(group_size=8)])
def test_a_weight_without_codes_that_the_operator_takes_is_rounded_by_rows(
    spec: QuantizerSpec | None, tmp_path: Path
) -> None:
    import onnxruntime

    from distill.exporters.onnx_embeddings import round_ends

    model, file = Ends(64, True), tmp_path / "model.onnx"
    codes = {} if spec is None else codes_of(model, spec)
    write(model, file, folded=False)
    assert round_ends(model, codes, file) == 0  # type: ignore[arg-type]
    codes_of(model, Int8Channel())
    (logits,) = onnxruntime.InferenceSession(file).run(["logits"], {"input_ids": torch.tensor([[3, 4]]).numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model.head(model.embed(torch.tensor([[3, 4]]))).detach())


def test_a_graph_that_reads_them_otherwise_is_refused(tmp_path: Path) -> None:
    from distill.exporters.onnx_embeddings import round_ends

    model, file = Ends(64, False), tmp_path / "model.onnx"
    write(model, file, folded=False)
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(DistillError, match=r"no operator reads head.weight; set embeddings: float32"):
        round_ends(model, {}, file)  # type: ignore[arg-type]
