import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill.core.batch import causal_batch
from distill.core.errors import DistillError, InputError
from distill.data.tokenizer import load_tokenizer, train_tokenizer
from distill.evaluation.engine import Opening
from distill.exporters import Gguf
from distill.exporters.base import EngineMissing
from distill.exporters.compressed_tensors import save
from distill.exporters.gguf_blocks import code_blocks
from distill.exporters.gguf_vocabulary import pre_tokenizer_name
from distill.exporters.stored_weights import stored_weights
from distill.models.kv_cache import round_cache
from distill.quantization import Q40, QUANTIZERS, DynamicInt8, Int8Channel
from distill.quantization.base import Codes
from distill.quantization.convert import convert, round_unquantized
from distill.quantization.embeddings import EmbeddingsKind, embeddings_grid
from distill.quantization.fake_quant import switch
from distill.quantization.prepare import prepare

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'distill-lm[test]'")
in_llama_cpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama.cpp is not installed: pip install 'distill-lm[gguf]'"
)

Batches = list[dict[str, torch.Tensor]]
TEXT = "the student learns what its teacher knows; def f(x):\n    return x ** 2  # 1234 naïve\n\n\tüber "
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": None, "rms_norm_eps": 1e-2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
WINDOWS = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama_tied_biased": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "llama3_rope": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama_wide": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.08})
    ),
    "linear_rope": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LINEAR)),
    "mistral_wide_heads": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=32, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "llama_64": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=64)),
    "llama_96": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=96)),
    "qwen3_64": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=64)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=32)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **WINDOWS)),
    "gemma3_pruned": lambda: Gemma3ForCausalLM(  # layers of a pattern that no published model has
        Gemma3TextConfig(**SIZES, **WINDOWS, layer_types=["full_attention", "sliding_attention"])
    ),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES | {"pad_token_id": 0})),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT * 3], 320, tmp_path_factory.mktemp("bpe") / "tokenizer")


@pytest.fixture
def texts(bpe: PreTrainedTokenizerFast) -> Batches:
    ids = torch.tensor(bpe(TEXT * 3)["input_ids"][:48]).view(2, 24)
    return [causal_batch(ids, torch.ones_like(ids, dtype=torch.bool))]


@pytest.fixture
def write(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """(model as it is stored, its folder), of an architecture, on a grid if one is named."""

    def make(name: str, kind: str | None = None, **settings: object) -> tuple[PreTrainedModel, Path]:
        model, folder = build(name), tmp_path / f"{name}-{kind}"
        if kind is None:
            round_unquantized(model, torch.bfloat16)
            model.save_pretrained(folder)
        else:
            spec = QUANTIZERS[kind](**settings)
            prepare(model, spec)
            round_unquantized(model, torch.bfloat16)
            save(model, folder, dtype=torch.float32)
        bpe.save_pretrained(folder)
        return model, folder

    return make


@pytest.mark.parametrize("name", ["llama", "mistral_wide_heads", "qwen2", "gemma3", "phi3"])
def test_transformers_reads_the_same_model_back(
    name: str, write: Callable[..., tuple[PreTrainedModel, Path]], texts: Batches, tmp_path: Path
) -> None:
    """A reader that is not ours finds every name, and puts the rows of queries and keys back."""
    model, source = write(name)
    notes = Gguf(embeddings="f32").export(source, tmp_path / "out", title="small")
    assert notes[0].startswith("layers: ")
    assert notes[0].endswith(" as F16, as trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="small.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        ours, theirs = (each(texts[0]["input_ids"]).logits for each in (model, again))
    assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max()


@pytest.mark.parametrize("name", ["llama_tied_biased", "llama3_rope"])
def test_what_transformers_leaves_out_is_in_the_file(
    name: str, write: Callable[..., tuple[PreTrainedModel, Path]], tmp_path: Path
) -> None:
    model, source = write(name)
    Gguf().export(source, tmp_path / "out", title="small")
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out" / "small.gguf").tensors}
    assert ("output.weight" in read) is not model.config.tie_word_embeddings
    if name == "llama3_rope":
        plain = 1e4 ** -(torch.arange(0, 16, 2) / 16)
        assert torch.allclose(
            plain / torch.from_numpy(read["rope_freqs.weight"].copy()), model.model.rotary_emb.inv_freq
        )
    else:
        bias = model.state_dict()["model.layers.1.self_attn.k_proj.bias"].view(2, 16)
        pairs = torch.stack([bias[:, :8], bias[:, 8:]], -1).flatten()  # row i of a head turns with row i + 8
        assert numpy.array_equal(read["blk.1.attn_k.bias"], pairs.numpy())
        assert {"blk.0.attn_output.bias", "blk.0.ffn_gate.bias", "blk.0.ffn_down.bias"} <= set(read)


@in_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(
    name: str,
    write: Callable[..., tuple[PreTrainedModel, Path]],
    texts: Batches,
    tmp_path: Path,
) -> None:
    model, source = write(name)
    Gguf().export(source, tmp_path / "out", title="small")
    result = Gguf(max_kl=1e-3).verify(model, tmp_path / "out", texts, load_tokenizer(source))
    assert result.tokens == 48
    assert result.kl < 1e-4  # its cache and its products of fp16 weights are in fp16
    assert result.weight_bytes == (tmp_path / "out" / "small.gguf").stat().st_size


@in_llama_cpp
def test_it_is_measured_in_llama_cpp(
    write: Callable[..., tuple[PreTrainedModel, Path]], agrees: Callable[..., None], tmp_path: Path
) -> None:
    model, source = write(next(iter(MODELS)))
    Gguf(embeddings="f32").export(source, tmp_path / "out", title="small")
    engine = Opening(str(tmp_path / "out"), Gguf.runs_in).open()
    assert (engine.dtype, engine.decodes) == ("F16", True)
    assert engine.name.startswith("llama.cpp (llama-cpp-python")
    agrees(engine, model, 0.05)
    (tmp_path / "out" / "small.gguf").write_bytes(b"no file of llama.cpp")
    with pytest.raises(InputError, match=r"llama\.cpp cannot load the file"):
        Opening(str(tmp_path / "out"), Gguf.runs_in).open()


def test_the_teacher_can_be_rounded_to_the_precision_of_a_file(
    write: Callable[..., tuple[PreTrainedModel, Path]], tmp_path: Path
) -> None:
    _, source = write(next(iter(MODELS)))
    for round_to, embeddings in ((None, "f16"), ("q8_0", "q8_0"), ("q4_0", "q8_0")):
        folder = tmp_path / f"{round_to}"
        spec = Gguf(round_to=round_to, embeddings=embeddings, max_kl=3)
        spec.export(source, folder, title="small")
        assert spec.label(folder) == f"GGUF {(round_to or 'f16').upper()}"
        assert Gguf(max_kl=3).post_training(folder) == spec, "by the file, whatever wrote it"
        assert spec.num_bytes(folder) == (folder / "small.gguf").stat().st_size


GRIDS = {
    "int_group": ({"bits": 4, "group_size": 32}, "Q4_0"),
    "int8_channel": ({}, "Q8_0"),
    "q4_0": ({}, "Q4_0"),
    "q8_0": ({}, "Q8_0"),
    "ternary": ({}, "Q4_0"),  # rows of 64 do not fill a block of 256; the codes are the same
}


@pytest.mark.parametrize("kind", GRIDS)
def test_codes_are_written_as_they_were_trained(
    kind: str, write: Callable[..., tuple[PreTrainedModel, Path]], tmp_path: Path
) -> None:
    settings, expected = GRIDS[kind]
    model, source = write("qwen3", kind, **settings)
    notes = Gguf().export(source, tmp_path / "out", title="small")
    assert notes[0] == f"layers: 14 as {expected}, as trained; 14 from their codes"
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "small.gguf").tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    spec = QUANTIZERS[kind](**settings)
    for layer, codes in convert(model).items():
        tensor = read[names.get_name(f"{layer}.weight", try_suffixes=(".weight",))]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert numpy.array_equal(values, spec.dequantize(codes).numpy()), layer


def test_a_bit_that_the_disk_has_changed_is_found(
    write: Callable[..., tuple[PreTrainedModel, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.exporters import gguf_file as writing

    read_back = writing._read_back

    def spoilt(file: Path, tensors: object) -> int:
        tensor = next(t for t in gguf.GGUFReader(file).tensors if t.tensor_type.name == "Q4_0")
        content = bytearray(file.read_bytes())
        content[tensor.data_offset + 2] ^= 1  # behind a block's scale: a code
        file.write_bytes(content)
        return read_back(file, tensors)

    monkeypatch.setattr(writing, "_read_back", spoilt)
    _, source = write("llama", "q4_0")
    with pytest.raises(DistillError, match=r"small\.gguf: tensor \S+ differs from what was written"):
        Gguf().export(source, tmp_path / "out", title="small")


@in_llama_cpp
@pytest.mark.parametrize("kind", GRIDS)
def test_llama_cpp_runs_the_codes(
    kind: str,
    write: Callable[..., tuple[PreTrainedModel, Path]],
    texts: Batches,
    tmp_path: Path,
    bpe: PreTrainedTokenizerFast,
) -> None:
    model, source = write("llama", kind, **GRIDS[kind][0])
    Gguf().export(source, tmp_path / "out", title="small")
    assert Gguf(max_kl=0.1).verify(model, tmp_path / "out", texts, bpe).kl < 5e-3  # activations of 8 bits
    with pytest.raises(DistillError, match="differs from the trained model: the largest KL"):
        Gguf(max_kl=0.0).verify(model, tmp_path / "out", texts, bpe)


def test_a_grid_of_the_activations_is_left_out_and_said(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build("llama")
    prepare(model, Int8Channel(), activations=DynamicInt8())
    save(model, tmp_path / "in", dtype=torch.float32)
    bpe.save_pretrained(tmp_path / "in")
    notes = Gguf().export(tmp_path / "in", tmp_path / "out", title="small")
    assert any(note.startswith("activations: the trained activation quantizer is not stored") for note in notes)


@in_llama_cpp
@pytest.mark.parametrize("settings", [{"group_size": 256}, {}], ids=["by_256", "per_tensor"])
def test_llama_cpp_runs_ternary_codes_in_blocks_of_256(
    settings: dict[str, int],
    write: Callable[..., tuple[PreTrainedModel, Path]],
    texts: Batches,
    tmp_path: Path,
    bpe: PreTrainedTokenizerFast,
) -> None:
    model, source = write("llama_wide", "ternary", **settings)
    notes = Gguf(embeddings="f32").export(source, tmp_path / "out", title="small")
    assert notes[0] == "layers: 14 as TQ2_0, as trained; 14 from their codes"
    assert Gguf(max_kl=0.1).verify(model, tmp_path / "out", texts, bpe).kl < 5e-3  # activations of 8 bits, by 256


@pytest.mark.parametrize(("low", "high", "group", "expected"), [
    (-1, 1, 256, "TQ2_0"), (-1, 1, 512, "TQ2_0"), (-1, 1, 64, "Q4_0"), (-8, 7, 32, "Q4_0"), (-8, 7, 256, "Q4_0"),
    (-16, 15, 32, "Q8_0"), (-128, 127, 512, "Q8_0"),
])  # fmt: skip
def test_blocks_hold_the_codes(low: int, high: int, group: int, expected: str) -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randint(low, high + 1, (3, 512), generator=random).char()
    values[:, ::group] = low
    values[:, 1::group] = high
    scale = torch.rand(3, 512 // group, generator=random).add(0.01).half()
    blocks = code_blocks("layer", Codes(values, scale))
    kind = gguf.GGMLQuantizationType[expected]
    assert blocks.format == expected
    read = gguf.quants.dequantize(blocks.data, kind)
    assert numpy.array_equal(read, (values.float() * scale.float().repeat_interleave(group, -1)).numpy())
    assert numpy.array_equal(read, blocks.values)
    if (low, high) != (-16, 15) and expected != "Q8_0" and scale.numel():
        # and it is what ggml's own layout makes of these very numbers, where its quantizer finds the same scale
        assert blocks.data.shape == gguf.quants.quantize(read, kind).shape


def test_scales_beyond_fp16() -> None:
    values = torch.ones(1, 64).char()
    tiny = code_blocks("layer", Codes(values, torch.tensor([[1.0, 3e-7]]).bfloat16()))
    assert tiny.moved_scales == 1
    values[:, 32:] = 0
    assert code_blocks("layer", Codes(values, torch.tensor([[1.0, 3e-7]]).bfloat16())).moved_scales == 0
    with pytest.raises(InputError, match=r"layer: a scale is 1e\+05"):
        code_blocks("layer", Codes(values, torch.tensor([[1e5, 1.0]])))


def test_stored_weights_are_the_codes(write: Callable[..., tuple[PreTrainedModel, Path]]) -> None:
    model, source = write("llama", "int_group", bits=3, group_size=32)
    found = dict(stored_weights(source))
    codes = convert(model)
    assert {key for key, value in found.items() if isinstance(value, Codes)} == {f"{name}.weight" for name in codes}
    for name, expected in codes.items():
        assert torch.equal(found[f"{name}.weight"].values, expected.values)
        assert torch.equal(found[f"{name}.weight"].scale.float(), expected.scale.float())
    assert set(found) == set(model.state_dict())


def test_the_tokenizer_is_in_the_file(
    write: Callable[..., tuple[PreTrainedModel, Path]], tmp_path: Path, bpe: PreTrainedTokenizerFast
) -> None:
    _, source = write("llama")
    Gguf().export(source, tmp_path / "out", title="small")
    fields = gguf.GGUFReader(tmp_path / "out" / "small.gguf").fields
    vocabulary = bpe.get_vocab()
    assert fields["tokenizer.ggml.tokens"].contents() == sorted(vocabulary, key=vocabulary.get)
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.bos_token_id"].contents() == bpe.bos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.ggml.token_type"].contents()[:3] == [3, 3, 1]
    assert "tokenizer.chat_template" not in fields
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "out" / "Modelfile").read_text()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 131072}))
    bpe_with_template = source / "chat_template.jinja"
    bpe_with_template.write_text("{{ messages[0]['content'] }}")
    Gguf().export(source, tmp_path / "chat", title="small")
    fields = gguf.GGUFReader(tmp_path / "chat" / "small.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0]['content'] }}"
    modelfile = (tmp_path / "chat" / "Modelfile").read_text()
    assert "TEMPLATE" not in modelfile
    assert "PARAMETER num_ctx 8192\n# the model supports up to 131072 tokens" in modelfile


@in_llama_cpp
def test_another_tokenizer_is_found(
    write: Callable[..., tuple[PreTrainedModel, Path]], texts: Batches, tmp_path: Path, bpe: PreTrainedTokenizerFast
) -> None:
    model, source = write("llama")
    state = json.loads((source / "tokenizer.json").read_text())
    state["model"]["merges"] = state["model"]["merges"][:3]
    (source / "tokenizer.json").write_text(json.dumps(state))
    Gguf().export(source, tmp_path / "out", title="small")
    with pytest.raises(DistillError, match="tokenizer differs from the trained model's"):
        Gguf().verify(model, tmp_path / "out", texts, bpe)


def test_an_engine_that_is_missing_is_named(
    write: Callable[..., tuple[PreTrainedModel, Path]], texts: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = write("llama")
    notes = Gguf().export(source, tmp_path / "out", title="small")
    assert notes[-1] == "read back: all 21 tensors of the file are bitwise equal to the model's"
    monkeypatch.setattr("distill.exporters.base.find_spec", lambda module: None)
    with pytest.raises(EngineMissing, match=r"not verified in llama.cpp.*pip install 'distill-lm\[gguf\]'"):
        Gguf().verify(model, tmp_path / "out", texts)
    with pytest.raises(
        InputError,
        match=r"needs gguf, which is not installed: CMAKE_ARGS=-DGGML_NATIVE=OFF pip install 'distill-lm\[gguf\]'",
    ):
        Gguf().export(source, tmp_path / "new", title="small")


def test_a_full_model_can_be_rounded_and_says_so(
    write: Callable[..., tuple[PreTrainedModel, Path]], tmp_path: Path
) -> None:
    _, plain = write("llama")
    notes = Gguf(round_to="q4_0", embeddings="q8_0").export(plain, tmp_path / "out", title="small")
    assert notes[0] == "layers: 14 as Q4_0, rounded to nearest by the exporter, after training"
    assert notes[1] == "embeddings and head: Q8_0, rounded by the exporter, after training"
    _, low_bit = write("llama", "q4_0")
    with pytest.raises(InputError, match="low-bit already; remove round_to"):
        Gguf(round_to="q4_0").export(low_bit, tmp_path / "again", title="small")


@pytest.mark.parametrize(("name", "change", "message"), [
    ("llama", {"model_type": "gpt2"}, "model_type 'gpt2' cannot be written as GGUF"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
    ("mistral_wide_heads", {"sliding_window": 8}, "sliding_window 8, expected null"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'yarn'"),
    ("qwen2", {"hidden_size": 128}, "num_attention_heads 4 x head_dim 16"),
    ("olmo2", {"hidden_size": 128, "head_dim": 16}, "num_attention_heads 4 x head_dim 16"),
    ("gemma", {"tie_word_embeddings": False}, "a head of its own"),
    ("gemma2", {"attn_logit_softcapping": None}, "llama.cpp always caps"),
    ("gemma3", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16, expected 256"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
])  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, change: dict[str, object], message: str, write: Callable[..., tuple[PreTrainedModel, Path]],
    tmp_path: Path,
) -> None:  # fmt: skip
    _, source = write(name)
    config = json.loads((source / "config.json").read_text())
    if name == "qwen2":
        config["head_dim"] = 16
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        Gguf().export(source, tmp_path / "out", title="small")


def test_weights_and_codes_without_a_place_are_refused(
    write: Callable[..., tuple[PreTrainedModel, Path]], tmp_path: Path
) -> None:
    _, groups = write("llama", "int_group", bits=4, group_size=16)
    with pytest.raises(InputError, match="16 weights share a scale"):
        Gguf().export(groups, tmp_path / "a", title="small")
    _, shifted = write("llama", "int_group", bits=4, group_size=32, symmetry="asymmetric")
    with pytest.raises(InputError, match="no format for asymmetric codes"):
        Gguf().export(shifted, tmp_path / "b", title="small")


def test_pre_tokenizers(bpe: PreTrainedTokenizerFast) -> None:
    state = json.loads(bpe.backend_tokenizer.to_str())
    byte_level = state["pre_tokenizer"]
    split = {
        "type": "Split", "behavior": "Isolated", "invert": False,
        "pattern": {
            "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        },
    }  # fmt: skip

    def named(*steps: dict[str, object], **changed: object) -> str:
        return pre_tokenizer_name(state | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}} | changed)

    assert named(byte_level) == "gpt-2"
    assert named({"type": "Digits", "individual_digits": True}, byte_level) == "smollm"
    assert named(split, byte_level | {"use_regex": False}) == "llama-bpe"
    for steps in ([byte_level | {"add_prefix_space": True}], [split, byte_level], [{"type": "Whitespace"}]):
        with pytest.raises(InputError, match="tokenizer: cannot be written as GGUF"):
            named(*steps)
    with pytest.raises(InputError, match="it normalizes text"):
        named(byte_level, normalizer={"type": "Lowercase"})
    words = json.loads(Tokenizer.from_str(bpe.backend_tokenizer.to_str()).to_str())
    words["model"]["type"] = "WordLevel"
    with pytest.raises(InputError, match="it is WordLevel"):
        pre_tokenizer_name(words)


@in_llama_cpp
@pytest.mark.parametrize("name", ["llama_64", "llama_96", "qwen3_64"])
def test_llama_cpp_keeps_keys_and_values_as_they_were_trained(
    name: str, bpe: PreTrainedTokenizerFast, texts: Batches, tmp_path: Path
) -> None:
    """Its 4-bit cache is far from none, and far from blocks that are not rotated or are in another order."""
    model = build(name)
    round_unquantized(model, torch.bfloat16)
    round_cache(model, "q4_0")
    model.save_pretrained(tmp_path / "in")
    bpe.save_pretrained(tmp_path / "in")
    notes = Gguf(embeddings="f32").export(tmp_path / "in", tmp_path / "out", title="small")
    assert (
        "keys and values: trained for llama.cpp's KV cache in q4_0, so run it with `-fa on --cache-type-k q4_0"
        in str(notes)
    )
    assert "OLLAMA_KV_CACHE_TYPE=q4_0" in (tmp_path / "out" / "Modelfile").read_text()
    found = {"ours": Gguf().verify(model, tmp_path / "out", texts).kl}
    for layer in model.model.layers:
        layer.self_attn.interleaved ^= True
    found["order"] = Gguf(max_kl=9).verify(model, tmp_path / "out", texts).kl
    switch(model, enabled=False)
    found["none"] = Gguf(max_kl=9).verify(model, tmp_path / "out", texts).kl
    assert found["ours"] < 0.3 * min(found["order"], found["none"]), found


ENDS = ("token_embd.weight", "output.weight")


def ends_of(folder: Path) -> dict[str, str]:
    """Tensor type of embeddings and head in an export's file."""
    reader = gguf.GGUFReader(folder / "small.gguf")
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors if tensor.name in ENDS}


@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "int8"])
@pytest.mark.parametrize("name", ["llama_wide", "llama_tied"])
def test_trained_embeddings_are_written_from_their_codes(
    name: str, kind: EmbeddingsKind, bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sizes = SIZES | {"hidden_size": 256, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=name == "llama_tied")).eval()
    prepare(model, Q40(), embeddings=embeddings_grid(kind, Q40()))
    round_unquantized(model, torch.float32)
    save(model, tmp_path / "in", bpe, dtype=torch.float32)
    notes = Gguf().export(tmp_path / "in", tmp_path / "out", title="small")
    of_file = "Q6_K" if kind == "q6_k" else "Q8_0"
    assert f"embeddings and head: {of_file}, from their codes" in notes
    assert ends_of(tmp_path / "out") == dict.fromkeys(ENDS[: 1 if name == "llama_tied" else 2], of_file)
    codes = convert(model)
    for tensor in gguf.GGUFReader(tmp_path / "out" / "small.gguf").tensors:
        if tensor.name in ENDS:
            layer = "model.embed_tokens" if tensor.name == ENDS[0] else "lm_head"
            exact = Q40().dequantize(codes[layer]).numpy()
            assert numpy.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), exact)
    with pytest.raises(InputError, match="the embeddings are low-bit already; remove embeddings from the target"):
        Gguf(embeddings="f16").export(tmp_path / "in", tmp_path / "again", title="small")
    with pytest.raises(InputError, match=r"the model's embeddings are \S+.* already; remove embeddings"):
        Gguf(embeddings="f16").check_grids([Q40()], None, embeddings_grid(kind, Q40()))


@pytest.mark.parametrize(
    ("trained", "target", "expected"),
    [
        ("q4_0", {}, "Q8_0"),  # embeddings: keep in training, rounded here
        ("q4_0", {"embeddings": "f16"}, "F16"),
        ("q8_0", {}, "F16"),
        (None, {}, "F16"),
        (None, {"round_to": "q8_0"}, "F16"),
        (None, {"round_to": "q4_0"}, "Q8_0"),
        (None, {"round_to": "q4_0", "embeddings": "f32"}, "F32"),
    ],
)
def test_embeddings_are_rounded_where_the_layers_have_few_bits(
    trained: str | None,
    target: dict[str, str],
    expected: str,
    write: Callable[..., tuple[PreTrainedModel, Path]],
    tmp_path: Path,
) -> None:
    _, source = write("qwen3", trained)
    notes = Gguf(**target).export(source, tmp_path / "out", title="small")
    assert ends_of(tmp_path / "out") == {ENDS[0]: expected}
    told = ", rounded by the exporter, after training" if expected == "Q8_0" else ""
    assert f"embeddings and head: {expected}{told}" in notes


@in_llama_cpp
@pytest.mark.parametrize("kind", ["q8_0", "q6_k"])
def test_llama_cpp_runs_quantized_embeddings(
    kind: EmbeddingsKind, texts: Batches, bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sizes = SIZES | {"hidden_size": 256, "initializer_range": 0.08}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
    prepare(model, Q40(), embeddings=embeddings_grid(kind, Q40()))
    round_unquantized(model, torch.float32)
    save(model, tmp_path / "in", bpe, dtype=torch.float32)
    Gguf().export(tmp_path / "in", tmp_path / "out", title="small")
    assert Gguf(max_kl=0.1).verify(model, tmp_path / "out", texts, bpe).kl < 5e-3
