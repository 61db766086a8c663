import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from distill.core.errors import InputError
from distill.quantization import Int8Channel, IntGroup
from distill.quantization.fake_quant import FakeQuantLinear, fake_quant_layers
from distill.quantization.prepare import prepare, unprepare


def test_prepare_wraps_all_but_the_head_and_keeps_the_state_dict(llama: nn.Module) -> None:
    before = llama.state_dict()
    names = prepare(llama, IntGroup())
    assert len(names) == 2 * 7
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert all(isinstance(llama.get_submodule(name), FakeQuantLinear) for name in names)
    assert type(llama.lm_head) is nn.Linear
    after = llama.state_dict()
    assert list(after) == list(before)
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)


def test_unprepare_gives_the_model_back(llama: nn.Module, ids: torch.Tensor) -> None:
    logits, layer = llama(ids).logits, llama.model.layers[0].mlp.up_proj
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    calls: list[int] = []
    names = prepare(llama, Int8Channel())
    llama(ids)
    assert calls == [1]  # hooks outlive the preparation
    assert unprepare(llama) == names
    handle.remove()
    assert torch.equal(llama(ids).logits, logits)
    assert llama.model.layers[0].mlp.up_proj is layer
    assert type(layer) is nn.Linear
    assert not hasattr(layer, "spec")


@pytest.mark.parametrize(
    ("skip", "left"), [(("lm_head", "*_proj"), 0), (("lm_head", "down_proj"), 12), (("model.layers.0.*",), 8), ((), 15)]
)
def test_skip_patterns(llama: nn.Module, skip: tuple[str, ...], left: int) -> None:
    if left:
        assert len(prepare(llama, IntGroup(skip=skip))) == left
    else:
        with pytest.raises(InputError, match="no layer to quantize"):
            prepare(llama, IntGroup(skip=skip))


def test_mistakes_change_nothing(llama: nn.Module) -> None:
    with pytest.raises(InputError, match=r"'upproj' matches no linear layer.*up_proj"):
        prepare(llama, IntGroup(skip=("upproj",)))
    with pytest.raises(InputError, match=r"down_proj: group_size \(64\) must divide in_features \(96\); try 32"):
        prepare(llama, IntGroup(group_size=64))
    assert not any(isinstance(module, FakeQuantLinear) for module in llama.modules())
    with pytest.raises(InputError, match="0 linear layers"):
        prepare(nn.Sequential(nn.ReLU()), IntGroup())
    prepare(llama, IntGroup())
    with pytest.raises(InputError, match="already"):
        prepare(llama, IntGroup())


def test_layers_may_have_grids_of_their_own(llama: nn.Module) -> None:
    wide, narrow = Int8Channel(), IntGroup(bits=2)
    prepare(llama, IntGroup(), [("*.down_proj", wide), ("model.layers.1.mlp.*", narrow)])
    grids = {name.removeprefix("model.layers."): layer.spec for name, layer in fake_quant_layers(llama).items()}
    assert grids["0.mlp.down_proj"] is grids["1.mlp.down_proj"] is wide
    assert grids["1.mlp.up_proj"] is narrow
    assert grids["0.mlp.up_proj"] == grids["1.self_attn.q_proj"] == IntGroup()


def test_patterns_without_effect_are_refused(llama: nn.Module) -> None:
    with pytest.raises(InputError, match=r"layers: 'dwn' matches no linear layer.*down_proj"):
        prepare(llama, IntGroup(), [("dwn", Int8Channel())])
    with pytest.raises(InputError, match="layers: 'lm_head' matches only layers that skip"):
        prepare(llama, IntGroup(), [("lm_head", Int8Channel())])
    with pytest.raises(InputError, match=r"include: 'wte' matches no embedding.*embed_tokens"):
        prepare(llama, IntGroup(include=("wte",)))
    assert not fake_quant_layers(llama)


def test_embeddings_are_quantized_if_asked(llama: nn.Module, ids: torch.Tensor) -> None:
    spec = IntGroup(include=("embed_tokens",), skip=("*_proj", "lm_head"))
    embedding = llama.model.embed_tokens
    rows = spec.dequantize(spec.quantize(embedding.weight))
    assert prepare(llama, spec) == ["model.embed_tokens"]
    assert torch.equal(embedding(ids), rows[ids])
    embedding(ids).sum().backward()
    assert embedding.weight.grad[ids].eq(embedding.weight.grad[ids][..., :1]).all()
    assert unprepare(llama) == ["model.embed_tokens"]
    assert type(embedding) is nn.Embedding


def test_weights_outside_of_linear_layers_are_not_passed_over() -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    mixtral = MixtralForCausalLM(
        MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    )
    with pytest.raises(InputError, match=r"layers\.0\.mlp\S* \(Mixtral.*add '\w+' to skip"):
        prepare(mixtral, IntGroup())
    names = prepare(mixtral, IntGroup(skip=("lm_head", "experts", "gate")))
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(InputError, match=r"c_attn \(Conv1D\).*cannot be quantized"):
        prepare(gpt2, IntGroup())
