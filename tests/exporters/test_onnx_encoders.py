"""Encoders in ONNX Runtime: with a head for masked words or for classes, texts of any length, padding and pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile

import numpy
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from distill.core.errors import DistillError, InputError
from distill.exporters import Gguf, HuggingFace, Onnx
from distill.models.load import load_model

for module in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install 'distill-lm[test]'")

Batches = list[dict[str, torch.Tensor]]
BERT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 32, "initializer_range": 0.2, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 32,
    "initializer_range": 0.2, "num_labels": 3,
}  # fmt: skip
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "bert classes": (lambda: BertForSequenceClassification(BertConfig(**BERT)), 7),
    "distilbert words": (lambda: DistilBertForMaskedLM(DistilBertConfig(**DISTILBERT)), 7),
}
"""Model, and linear layers below its last one."""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def write(
    tmp_path: Path, graphs: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], tuple[PreTrainedModel, Path]]:
    """(model, its export) of a name of MODELS; a graph is traced once, which takes seconds."""

    def make(name: str, weights: str) -> tuple[PreTrainedModel, Path]:
        torch.manual_seed(0)
        model = MODELS[name][0]().eval()
        model.save_pretrained(tmp_path / "in")
        tokenizer.save_pretrained(tmp_path / "in")
        traced = graphs / f"{name}.onnx"
        if traced.is_file():
            monkeypatch.setattr("distill.exporters.onnx_file.write_graph", lambda model, file: copyfile(traced, file))
        folder = tmp_path / weights
        Onnx(weights=weights).export(tmp_path / "in", folder, title="small")
        if weights == "float32":
            copyfile(folder / "model.onnx", traced)
        return model, folder

    return make


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_trained_model_and_rounded_close_to_it(
    name: str, write: Callable[[str, str], tuple[PreTrainedModel, Path]], batches: Batches
) -> None:
    import onnx
    import onnxruntime

    model, folder = write(name, "float32")
    result = Onnx(weights="float32", max_kl=1e-6).verify(model, folder, batches)
    assert result.tokens == (2 if "classes" in name else 8 + 5)  # the second text of nine is cut after five
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    wanted = [asked.name for asked in session.get_inputs()]
    assert ("token_type_ids" in wanted) == name.startswith("bert")
    for rows, length in ((1, 1), (3, 17)):
        ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(2))
        attended = torch.ones_like(ids)
        attended[0, (length + 1) // 2 :] = 0
        every = {
            "input_ids": ids,
            "attention_mask": attended,
            "token_type_ids": (torch.arange(length) > 4).long() + 0 * ids,
        }
        inputs = {key: every[key] for key in wanted}
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        (found,) = session.run(["logits"], {key: value.numpy() for key, value in inputs.items()})
        read = attended.bool().numpy() if found.ndim == 3 else slice(None)
        assert numpy.abs(found[read] - expected[read]).max() < 1e-4
    card = Onnx().card(folder)
    assert card.task == ("text-classification" if "classes" in name else "fill-mask")
    model, small = write(name, "int8")
    rounded = Onnx(max_kl=1.0).verify(model, small, batches)
    assert 0 < rounded.kl < 0.1
    kinds = [node.op_type for node in onnx.load(small / "model.onnx").graph.node]
    assert kinds.count("MatMulInteger") == MODELS[name][1]
    with pytest.raises(DistillError, match="differs from the trained model: the largest KL"):
        Onnx(max_kl=0.0).verify(model, small, batches)


def test_engines_of_decoders_take_no_encoder(tmp_path: Path, batches: Batches) -> None:
    MODELS["bert classes"][0]().save_pretrained(tmp_path / "in")
    assert "BertForSequenceClassification" in json.loads((tmp_path / "in" / "config.json").read_text())["architectures"]
    with pytest.raises(InputError, match="bert is a classifier of texts, which cannot be used here"):
        load_model(str(tmp_path / "in"), tasks=Gguf.tasks)
    for exporter in (Onnx, HuggingFace):
        assert load_model(str(tmp_path / "in"), tasks=exporter.tasks).config.num_labels == 3
