import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill.core.errors import InputError
from distill.exporters.compressed_tensors import save
from distill.exporters.plain_transformers import verify
from distill.exporters.stored_weights import stored_weights
from distill.models.load import load_model
from distill.quantization import Q40, Q80, Binary, Fp8, Int8Channel, IntGroup, Ternary
from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.convert import convert, round_unquantized
from distill.quantization.embeddings import EmbeddingsKind, embeddings_grid
from distill.quantization.lora import absorb_lora
from distill.quantization.prepare import prepare

Make = Callable[[str], PreTrainedModel]
SPECS = [
    IntGroup(),
    IntGroup(group_size=16, skip=("lm_head", "down_proj", "model.layers.0.*")),
    Int8Channel(),
    Int8Channel(skip=()),
    *(IntGroup(bits=bits, symmetry="asymmetric") for bits in (2, 3, 4, 5, 6, 8)),
    Fp8(),
    Q80(),
    Q40(),
    Ternary(),
    Ternary(group_size=32),
    Binary(),
    IntGroup(include=("embed_tokens",)),
    Q80(include=("embed_tokens",), skip=()),
]
IDS = ["int4", "int4_skips", "int8", "int8_head", *(f"int{bits}_asymmetric" for bits in (2, 3, 4, 5, 6, 8))]
IDS += ["fp8", "q8_0", "q4_0", "ternary", "ternary_group", "binary", "int4_embeddings", "q8_0_embeddings"]


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_bias"])
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_plain_transformers_computes_what_was_trained(
    make: Make, tmp_path: Path, batches: list[dict[str, torch.Tensor]], name: str, spec: QuantizerSpec
) -> None:
    model, ids = make(name), batches[0]["input_ids"]
    names = prepare(model, spec)
    round_unquantized(model, getattr(torch, spec.scale_dtype))
    trained = model(ids).logits
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save(model, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())

    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(ids).logits, trained)
    for layer, codes in convert(model).items():
        assert torch.equal(loaded.get_submodule(layer).weight, spec.dequantize(codes))
    is_tied = name != "llama"
    assert ("lm_head" in names) == (not spec.skip or (is_tied and bool(spec.include)))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("spec", [IntGroup, Int8Channel, Fp8])
def test_a_mixture_is_read_back_with_its_experts_as_they_are(
    tmp_path: Path, batches: list[dict[str, torch.Tensor]], kind: str, spec: type[QuantizerSpec]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 4} if kind == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 32}
    experts["num_experts_per_tok"] = 2
    config = AutoConfig.for_model(kind, **sizes, **experts, vocab_size=64, num_key_value_heads=2, head_dim=16)
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), batches[0]["input_ids"]
    prepare(model, spec(skip=("lm_head", "experts", "gate")))
    round_unquantized(model, torch.bfloat16)
    save(model, tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_loaded_in_bfloat16_each_weight_is_rounded_once(trained: PreTrainedModel, artifact: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(artifact)  # dtype from the config
    assert loaded.dtype == torch.bfloat16
    loaded(torch.zeros(1, 2, dtype=torch.long))
    for layer, codes in convert(trained).items():
        assert torch.equal(loaded.get_submodule(layer).weight, IntGroup().dequantize(codes).bfloat16())


def test_adapters_trained_inside_the_grid_survive_to_the_file(
    make: Make, tmp_path: Path, batches: list[dict[str, torch.Tensor]]
) -> None:
    model, ids = make("llama"), batches[0]["input_ids"]
    prepare(model, IntGroup())
    round_unquantized(model, torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    absorb_lora(adapted)
    trained = adapted(ids).logits
    with pytest.raises(InputError, match="adapters merged"):
        save(adapted, tmp_path)
    save(adapted.merge_and_unload(), tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits, trained)


def test_size_is_counted_from_what_is_written(make: Make, tmp_path: Path) -> None:
    model = make("qwen3")
    prepare(model, IntGroup())
    size = save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors  # tied: stored once
    assert size.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    packed = {key: tensor for key, tensor in tensors.items() if "_proj.weight" in key}
    assert size.packed_bytes == sum(tensor.nbytes for tensor in packed.values())
    weights = sum(tensor.prod().item() for key, tensor in packed.items() if key.endswith("weight_shape"))
    assert size.bfloat16_bytes == 2 * weights
    assert size.layers == 14
    assert 0.28 < size.ratio < 0.29
    others = {tensor.dtype for key, tensor in tensors.items() if key not in packed}
    assert others == {torch.bfloat16}


def test_config_names_the_format_and_what_is_left_out(make: Make, tmp_path: Path) -> None:
    model, spec = make("llama"), IntGroup(group_size=16, skip=("lm_head", "k_proj"))
    prepare(model, spec)
    save(model, tmp_path, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config["quantization_config"]
    assert config["dtype"] == "float32"
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "pack-quantized"
    assert quantization["ignore"] == ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "lm_head"]
    weights = quantization["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 16, True)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")


def test_tokenizer_comes_along(artifact: Path) -> None:
    assert AutoTokenizer.from_pretrained(artifact)("w3 w5")["input_ids"] == [3, 5]


def test_a_quantized_folder_is_not_prepared_again(artifact: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    with pytest.raises(InputError, match="quantized already"):
        prepare(loaded, IntGroup())


def test_refusals(make: Make, tmp_path: Path) -> None:
    model = make("llama")
    with pytest.raises(InputError, match="prepare it first"):
        save(model, tmp_path)
    prepare(model, IntGroup())
    with pytest.raises(InputError, match=r"expected torch\.bfloat16 or torch\.float32"):
        save(model, tmp_path, dtype=torch.float16)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("kind", [None, "q6_k", "int8"])
def test_embeddings_come_back_as_they_were_trained_tied_or_not(
    name: str, kind: EmbeddingsKind | None, tmp_path: Path, batches: list[dict[str, torch.Tensor]]
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model({"gemma3": "gemma3_text"}.get(name, name), **sizes, **special,
                             tie_word_embeddings=name != "llama")
    ).eval()  # fmt: skip
    prepare(model, IntGroup(), embeddings=embeddings_grid(kind, IntGroup()))
    dtype = torch.float32 if kind == "q6_k" else torch.bfloat16
    round_unquantized(model, dtype)
    size, ids, trained = save(model, tmp_path, dtype=dtype), batches[0]["input_ids"], convert(model)
    tensors = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in tensors or "lm_head.weight_packed" in tensors) == (name == "llama")
    assert tensors["model.embed_tokens.weight"].dtype == torch.int8
    assert size.total_bytes == sum(tensor.nbytes for tensor in tensors.values())

    verify(model, tmp_path, batches, max_kl=0.0)  # by plain transformers
    read = {key: weight for key, weight in stored_weights(tmp_path) if isinstance(weight, Codes)}
    for layer, codes in trained.items():
        if (stored := read.get(f"{layer}.weight")) is not None:
            assert torch.equal(stored.values, codes.values)
            assert torch.equal(stored.scale, codes.scale)
    assert len(read) == len(trained) - (name != "llama")
    loaded = load_model(str(tmp_path), dtype="float32")  # by the next stage
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (name != "llama")
    assert {*loaded.state_dict()} == set(model.state_dict())
