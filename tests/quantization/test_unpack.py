from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from distill.exporters.compressed_tensors import save
from distill.quantization import Fp8, Int8Channel, IntGroup
from distill.quantization.base import QuantizerSpec
from distill.quantization.convert import convert, round_unquantized
from distill.quantization.prepare import prepare
from distill.quantization.unpack import unpack


@pytest.mark.parametrize(
    "spec", [IntGroup(), Int8Channel(), Fp8(), IntGroup(symmetry="asymmetric")], ids=lambda s: s.label()
)
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after_a_forward"])
def test_unpacked_is_the_plain_model(
    llama: nn.Module, ids: torch.Tensor, tmp_path: Path, spec: QuantizerSpec, ran: bool
) -> None:
    keys, parameters = set(llama.state_dict()), llama.num_parameters()
    names = prepare(llama, spec)
    round_unquantized(llama, torch.bfloat16)
    trained = llama(ids).logits
    save(llama, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    if ran:
        loaded(ids)
    assert unpack(loaded) == names
    # the body first, on its own: this is what a packed model cannot do
    assert torch.equal(loaded.lm_head(loaded.base_model(ids).last_hidden_state), trained)
    assert torch.equal(loaded(ids).logits, trained)
    assert set(loaded.state_dict()) == keys
    assert loaded.num_parameters() == parameters
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for name, codes in convert(llama).items():
        assert torch.equal(loaded.get_submodule(name).weight, spec.dequantize(codes))
    loaded.save_pretrained(tmp_path / "plain")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(report.values())
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(again(ids).logits, trained)


def test_a_plain_model_is_left_alone(llama: nn.Module, ids: torch.Tensor) -> None:
    before = llama(ids).logits
    assert unpack(llama) == []
    assert torch.equal(llama(ids).logits, before)
