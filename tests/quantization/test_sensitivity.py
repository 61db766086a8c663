import itertools

import pytest
import torch
from torch import nn

from distill.core.batch import causal_batch
from distill.core.errors import InputError
from distill.evaluation.quality import predictions_of
from distill.quantization import Int8Channel, IntGroup
from distill.quantization.fake_quant import fake_quant_layers
from distill.quantization.prepare import prepare, unprepare
from distill.quantization.sensitivity import Sensitivity, choose, sensitivity, stored_bits

GRIDS = [IntGroup(bits=2), Int8Channel()]


def test_each_layer_alone_against_quantizing_it_alone(llama: nn.Module, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 4:] = False
    full = llama(ids).logits[mask].double().log_softmax(-1)
    names = prepare(llama, IntGroup())
    quantized = llama(ids).logits
    parts = [causal_batch(ids[:1], mask[:1]), causal_batch(ids[1:], mask[1:])]
    found = sensitivity(llama, GRIDS, parts, predictions_of(llama))
    assert torch.equal(llama(ids).logits, quantized)
    assert [one.layer for one in found] == names
    assert all(one.kl[0] > 10 * one.kl[1] > 0 for one in found)
    unprepare(llama)
    one = found[3]
    every = [name for name, module in llama.named_modules() if type(module) is nn.Linear]
    prepare(llama, IntGroup(bits=2, skip=tuple(name for name in every if name != one.layer)))
    assert list(fake_quant_layers(llama)) == [one.layer]
    alone = llama(ids).logits[mask].double().log_softmax(-1)
    assert one.kl[0] == pytest.approx((full.exp() * (full - alone)).sum(-1).mean().item(), rel=1e-4)


def test_bits_are_those_that_are_stored() -> None:
    assert stored_bits(IntGroup(bits=4, group_size=32), 128) == 4.5
    assert stored_bits(Int8Channel(), 128) == 8.125
    assert stored_bits(IntGroup(bits=4, group_size=32, symmetry="asymmetric"), 128) == 8.75


def test_the_choice_spends_the_budget_where_it_saves_most() -> None:
    found = [
        Sensitivity("a", 100, (1.0, 0.1, 0.0), (2.0, 4.0, 8.0)),
        Sensitivity("b", 100, (0.2, 0.1, 0.0), (2.0, 4.0, 8.0)),
        Sensitivity("c", 200, (0.3, 0.01, 0.0), (2.0, 4.0, 8.0)),
    ]

    def loss(choice: tuple[int, ...]) -> float:
        return sum(one.kl[i] for one, i in zip(found, choice, strict=True))

    def cost(choice: tuple[int, ...]) -> float:
        return sum(one.bits[i] * one.weights for one, i in zip(found, choice, strict=True)) / 400

    assert choose(found, 2.0) == {"a": 0, "b": 0, "c": 0}
    assert choose(found, 2.5) == {"a": 1, "b": 0, "c": 0}
    assert choose(found, 8.0) == {"a": 2, "b": 2, "c": 2}
    for bits in (2.0, 2.5, 3.5, 4.0, 5.0, 8.0):
        got = tuple(choose(found, bits).values())
        assert cost(got) <= bits
        best = min(loss(c) for c in itertools.product(range(3), repeat=3) if cost(c) <= bits)
        assert loss(got) <= best + 0.1
    with pytest.raises(InputError, match=r"bits \(1\.9\) must be at least 2\.000"):
        choose(found, 1.9)
