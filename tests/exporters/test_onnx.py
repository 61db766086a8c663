from collections.abc import Callable
from pathlib import Path
from shutil import copyfile

import numpy
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from distill.core.errors import DistillError, InputError
from distill.evaluation.engine import Opening
from distill.exporters import Onnx
from distill.exporters.base import EngineMissing

for module in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install 'distill-lm[test]'")

Batches = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {weights: tmp_path_factory.mktemp("onnx") / weights for weights in ("float32", "int8")}


@pytest.fixture
def write(artifact: Path, exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Both kinds of one export, traced once for all tests: that takes seconds."""

    def once(weights: str) -> Path:
        folder = exported[weights]
        if not folder.is_dir():
            if weights == "int8":
                graph = once("float32") / "model.onnx"
                monkeypatch.setattr(
                    "distill.exporters.onnx_file.write_graph", lambda model, file: copyfile(graph, file)
                )
            notes = Onnx(weights=weights).export(artifact, folder, title="small")
            (folder / "notes.txt").write_text("\n".join(notes))
        return folder

    return once


def test_float32_is_the_trained_model(trained: PreTrainedModel, write: Callable[[str], Path], batches: Batches) -> None:
    folder = write("float32")
    result = Onnx(weights="float32", max_kl=1e-6).verify(trained, folder, batches)
    assert result.tokens == 16
    assert result.top1_agreement == 1.0
    assert result.weight_bytes == (folder / "model.onnx").stat().st_size
    assert (folder / "notes.txt").read_text().endswith("14 layers have the dequantized values of their codes")


def test_int8_is_smaller_close_and_bounded(
    trained: PreTrainedModel, write: Callable[[str], Path], batches: Batches
) -> None:
    import onnx

    folder = write("int8")
    result = Onnx(max_kl=1.0).verify(trained, folder, batches)
    assert 0 < result.kl < 0.1
    kinds = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    assert kinds.count("MatMulInteger") == 14  # the tied head is left out
    assert kinds.count("MatMulNBits") == 1  # and reads the int8 codes that the lookup reads
    assert result.weight_bytes < Onnx().verify(trained, write("float32"), batches).weight_bytes
    assert "14 layers were low-bit already and are rounded a second time" in (folder / "notes.txt").read_text()
    with pytest.raises(DistillError, match="differs from the trained model: the largest KL"):
        Onnx(max_kl=0.0).verify(trained, folder, batches)


def test_it_is_measured_in_onnx_runtime(
    trained: PreTrainedModel, write: Callable[[str], Path], agrees: Callable[..., None]
) -> None:
    for weights in ("float32", "int8"):
        exporter, folder = Onnx(weights=weights), write(weights)
        engine = Opening(str(folder), exporter.runs_in).open()
        assert not engine.decodes
        assert engine.name.startswith("ONNX Runtime 1.")
        if weights == "float32":
            agrees(engine, trained, 1e-4)
        assert exporter.label(folder) == f"ONNX {weights}"
        assert exporter.num_bytes(folder) == (folder / "model.onnx").stat().st_size
    with pytest.raises(InputError, match="ONNX Runtime cannot load the graph"):
        Opening(str(folder.parent), exporter.runs_in).open()


def test_any_batch_and_length_and_padding(trained: PreTrainedModel, write: Callable[[str], Path]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(write("float32") / "model.onnx")
    for rows, length in ((1, 1), (3, 17)):
        ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(2))
        mask = torch.ones_like(ids)
        mask[0, (length + 1) // 2 :] = 0
        with torch.no_grad():
            expected = trained(input_ids=ids, attention_mask=mask).logits.numpy()
        (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        read = mask.bool().numpy()
        assert numpy.abs(found[read] - expected[read]).max() < 1e-4


def test_the_tokenizer_comes_along_and_the_lineage_stays(write: Callable[[str], Path]) -> None:
    folder = write("int8")
    assert AutoTokenizer.from_pretrained(folder)("w3 w5")["input_ids"] == [3, 5]
    assert not {"distill.json", "model.safetensors"} & {file.name for file in folder.iterdir()}
    assert "quantization_config" not in (folder / "config.json").read_text()


def test_gpt2s_layers_are_linear_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, batches: Batches) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 16, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=64, bos_token_id=1, eos_token_id=1)).eval()
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    Onnx().export(tmp_path / "gpt2", tmp_path / "out", title="small")
    # processors without dot products of 8 bits round more
    assert 0 < Onnx().verify(model, tmp_path / "out", batches).kl < 0.025


def test_a_mixture_is_refused_in_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, batches: Batches) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=64)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    with pytest.raises(
        InputError, match=r"mixtral: torch cannot export this model to ONNX \(No ONNX function"
    ) as error:
        Onnx().export(tmp_path / "mixtral", tmp_path / "out", title="small")
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_graph_and_missing_packages_are_named(
    trained: PreTrainedModel, artifact: Path, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(DistillError, match="ONNX Runtime cannot load the graph"):
        Onnx().verify(trained, tmp_path, batches)
    monkeypatch.setattr("distill.exporters.base.find_spec", lambda module: None)
    with pytest.raises(EngineMissing, match="not verified in ONNX Runtime"):
        Onnx().verify(trained, tmp_path, batches)
    with pytest.raises(InputError, match=r"target onnx needs onnx, which is not installed: .*distill-lm\[onnx\]"):
        Onnx().export(artifact, tmp_path / "new", title="small")


ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "vocab_size": 64, "initializer_range": 0.2}
SIZES = ENDS | {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def decoder() -> PreTrainedModel:
    """With grouped keys, and four tokens in sight of each."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=1, sliding_window=4)).eval()


def test_with_a_cache_it_writes_what_transformers_writes(
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batches: Batches,
    tmp_path: Path,
    agrees: Callable[..., None],
) -> None:
    """Token for token, from a text of one token and from several of which one is padded on the left."""
    import onnxruntime

    decoder.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    exporter = Onnx(weights="float32", keys_and_values="cached", max_kl=1e-6)
    exporter.export(tmp_path / "in", tmp_path / "out", title="small")
    assert exporter.verify(decoder, tmp_path / "out", batches).tokens == 16
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for rows, length in ((1, 1), (3, 6)):
        ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(3))
        mask = torch.ones_like(ids)
        mask[1:, :3] = 0
        expected = decoder.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert len({tuple(row) for row in expected[:, length:].tolist()}) == rows
        read, attended, made = ids.numpy(), mask.numpy(), []
        past = [asked for asked in session.get_inputs() if asked.name.startswith("past_key_values.")]
        state = {asked.name: numpy.zeros((rows, asked.shape[1], 0, asked.shape[3]), "float32") for asked in past}
        for _ in range(12):
            logits, *present = session.run(None, {"input_ids": read, "attention_mask": attended, **state})
            state = dict(zip(state, present, strict=True))
            read = logits[:, -1:].argmax(-1)
            attended = numpy.concatenate([attended, numpy.ones_like(read)], 1)
            made.append(read)
        assert numpy.array_equal(numpy.concatenate(made, 1), expected[:, length:].numpy())
    agrees(Opening(str(tmp_path / "out"), exporter.runs_in).open(), decoder, 1e-4)
    code = exporter.card(tmp_path / "out").how_to_load
    compile(code.removeprefix("```python").removesuffix("```"), "card", "exec")
    with pytest.raises(DistillError, match="differs from the trained model: the largest KL"):
        exporter.verify(decoder.apply(decoder._init_weights), tmp_path / "out", batches)


def test_what_has_no_cache_is_refused_by_name(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SIZES, num_hidden_layers=1)).save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    with pytest.raises(InputError, match=r"bert: the model's cache has other tensors than keys and values.*recomputed"):
        Onnx(keys_and_values="cached").export(tmp_path / "in", tmp_path / "out", title="small")
