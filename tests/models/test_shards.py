"""Weights read one by one: names of old checkpoints, and what is missing or does not fit. Same bits: contract tests."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from distill.core.errors import InputError
from distill.models.weight_files import Shards

SHAPE = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_of_the_bare_body_is_read_as_transformers_does(tmp_path):
    """As GPT-2's own checkpoint is: no prefix, and tensors that no longer mean anything."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=4))
    model.save_pretrained(tmp_path)
    bare = {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    rewrite(tmp_path, lambda old: {name.removeprefix("transformer."): value for name, value in old.items()} | bare)
    shards = Shards(str(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(shards.read(name), parameter)


def test_a_tied_weight_may_stand_under_either_name(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    first, second = "model.embed_tokens.weight", "lm_head.weight"
    rewrite(tmp_path, lambda old: {second if name == first else name: value for name, value in old.items()})
    assert torch.equal(Shards(str(tmp_path)).read(first), model.lm_head.weight)


def test_a_missing_weight_is_refused_before_anything_is_read(folder):
    rewrite(folder, lambda old: {name: value for name, value in old.items() if name != "model.norm.weight"})
    with pytest.raises(InputError, match=r"do not fit the config: model\.norm\.weight is missing"):
        Shards(str(folder))


def test_a_weight_of_another_shape_is_refused(folder):
    rewrite(folder, lambda old: old | {"model.norm.weight": torch.ones(9)})
    shards = Shards(str(folder))
    with pytest.raises(InputError, match=r"model\.norm\.weight has shape \[9\], expected \[8\]"):
        shards.read("model.norm.weight")


def test_a_cut_file_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors: begins with no whole header"):
        Shards(str(folder))


def test_a_folder_of_another_format_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model\.safetensors in it"):
        Shards(str(folder))
