import pytest
import torch
from torch import nn
from torch.nn import functional

from distill.core.errors import InputError
from distill.quantization import Int8Channel, IntGroup
from distill.quantization.base import QuantizerSpec
from distill.quantization.convert import convert, round_unquantized
from distill.quantization.prepare import prepare, unprepare


@pytest.mark.parametrize("spec", [IntGroup(), Int8Channel()], ids=lambda spec: spec.kind)
def test_what_was_trained_is_what_is_converted(llama: nn.Module, ids: torch.Tensor, spec: QuantizerSpec) -> None:
    names = prepare(llama.train(), spec)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = functional.cross_entropy(llama(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    llama.eval()
    trained = llama(ids).logits
    codes = convert(llama)
    assert list(codes) == names
    unprepare(llama)
    assert not torch.equal(llama(ids).logits, trained)
    with torch.no_grad():
        for name, layer_codes in codes.items():
            llama.get_submodule(name).weight.copy_(spec.dequantize(layer_codes))
    assert torch.equal(llama(ids).logits, trained)


def test_round_unquantized_leaves_the_latent_weights(llama: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    quantized = {f"{name}.weight" for name in prepare(llama, IntGroup())}
    round_unquantized(llama, torch.bfloat16)
    for name, tensor in llama.state_dict().items():
        assert tensor.dtype == torch.float32
        expected = before[name] if name in quantized else before[name].bfloat16().float()
        assert torch.equal(tensor, expected)
    assert not torch.equal(llama.lm_head.weight, before["lm_head.weight"])


def test_convert_refuses_what_it_cannot_ship(llama: nn.Module) -> None:
    with pytest.raises(InputError, match="prepare it first"):
        convert(llama)
    prepare(llama, IntGroup())
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        convert(llama)
