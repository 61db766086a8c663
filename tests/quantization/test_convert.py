"""What a prepared model is turned into; that it is what was trained stands in the contract of every quantizer."""

import pytest
import torch
from torch import nn

from distill.core.errors import InputError
from distill.quantization import IntGroup
from distill.quantization.convert import convert, round_unquantized
from distill.quantization.prepare import prepare


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
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*NaN or infinity"):
        convert(llama)
