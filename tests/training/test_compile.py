"""A compiled training is the training: same weights, same names, same resume, and no trace of it afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from distill.core.errors import MachineError
from distill.models.head import hidden_states
from distill.training import compile as compiling
from distill.training.checkpoint import checkpoint_path
from distill.training.compile import compiled_bodies
from distill.training.own_weights import OwnWeights

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler on a CPU"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of torch.compile but the making of machine code, which takes longest."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")


class PulledPlug(Exception):
    """Stands for a kill."""


def pull() -> None:
    raise PulledPlug


def weights(tmp_path: Path, folder: str) -> dict[str, Any]:
    return torch.load(checkpoint_path(tmp_path / folder / "checkpoints", 6), weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    "way",
    [
        "full",
        *(
            pytest.param(way, marks=pytest.mark.exhaustive)
            for way in ("masked", "quant lora head", "quant learned lora")
        ),
    ],
)
def test_it_trains_the_same_weights_and_a_kill_changes_no_bit(
    way: str, traced: None, module: Any, train: Any, tmp_path: Path
) -> None:
    def fit(folder: str, **settings: Any) -> None:
        trained = module(way)
        if "lora" in way:
            trained.teacher = OwnWeights(trained.student)
            trained.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            train(trained, folder, **settings)
        finally:
            for model in (trained.student, trained.teacher.model):
                assert all(part._compiled_call_impl is None for part in model.modules())

    fit("plain")
    assert not counters["stats"]["unique_graphs"]
    fit("straight", compile=True)
    assert counters["stats"]["unique_graphs"]
    with pytest.raises(PulledPlug):
        fit("resumed", compile=True, at={16: pull})
    fit("resumed", compile=True)
    plain, straight, resumed = (weights(tmp_path, folder) for folder in ("plain", "straight", "resumed"))
    assert list(straight) == list(plain)
    for name in straight:
        torch.testing.assert_close(straight[name], plain[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(resumed[name], straight[name])
        if way == "masked" and "layers" in name and straight[name].ndim == 2:
            assert ((straight[name].unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()


@pytest.mark.exhaustive
@needs_compiler
def test_machine_code_gives_the_same_gradient(module: Any, batch: Any) -> None:
    distilled = module()
    weights = list(distilled.student.parameters())
    plain = torch.autograd.grad(distilled.training_step(batch(0, 4), 0), weights)
    with compiled_bodies(distilled.student):
        ours = torch.autograd.grad(distilled.training_step(batch(0, 4), 0), weights)
    assert counters["inductor"]
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_machine_that_cannot_compile_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, llama: Any) -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiling, "BACKEND", no_compiler)
    model = llama()
    with (
        pytest.raises(MachineError, match=r"compute.compile: this machine cannot compile .*no compiler here.*false"),
        compiled_bodies(model),
    ):
        model(input_ids=torch.arange(4).unsqueeze(0))
    model(input_ids=torch.arange(4).unsqueeze(0))


def test_packed_rows_stay_apart(traced: None, llama: Any) -> None:
    model = llama().eval()
    ids = torch.arange(10).unsqueeze(0)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad(), compiled_bodies(model):
        packed = hidden_states(model, ids, position_ids=places)
    with torch.no_grad():
        alone = [hidden_states(model, some) for some in ids.split((4, 6), 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_layers_share_one_graph_and_attention_has_no_mask(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch, llama: Any
) -> None:
    """A dense mask would keep attention from the flash kernel."""
    graphs, attention = [], []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]  # a checkpoint has its own
        nodes = [node for part in parts for node in part.graph.nodes]
        attention.extend(node.kwargs for node in nodes if "scaled_dot" in str(node.target))
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    model = llama(num_hidden_layers=3).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with compiled_bodies(model):
        hidden_states(model, torch.arange(64).unsqueeze(0) % 16).sum().backward()
    assert all(p.grad is not None for p in model.base_model.parameters())
    assert len(graphs) == 1
    assert [(call["attn_mask"], call["is_causal"]) for call in attention] == [(None, True)]
