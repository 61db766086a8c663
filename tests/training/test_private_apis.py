"""What we assume of private APIs of Lightning and torch, where distill/training says "Private API".

Most tests have two halves: what would happen without our workaround, which fails when a new version makes it
unnecessary; and what happens with it, which fails when a new version makes it wrong.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import masking_utils

from distill.models.head import hidden_states
from distill.training.compile import compiled_bodies
from distill.training.metrics import read_rows
from distill.training.saver import Checkpoints
from distill.training.sharded import shard, unshard

BATCH = 4
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Handlers(pl.Callback):
    """Who would get SIGTERM while a training runs."""

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.found = signal.getsignal(signal.SIGTERM)


def test_lightning_handles_signals_unless_it_is_kept_from_it(module: Any, loader: Any, train: Any) -> None:
    before, handlers = signal.getsignal(signal.SIGTERM), Handlers()
    pl.Trainer(accelerator="cpu", devices=1, max_steps=1, callbacks=[handlers], **QUIET).fit(module(), loader(1))
    assert handlers.found is not before
    # its handler waits for the other ranks, within the signal
    assert "dist.broadcast(" in inspect.getsource(_SignalConnector._sigterm_notifier_fn)

    found: list[Any] = []
    train(module(), at={BATCH: lambda: found.append(signal.getsignal(signal.SIGTERM))})
    assert found[0].__module__ == "distill.core.listener"
    assert signal.getsignal(signal.SIGTERM) is before


def test_lightning_asks_all_ranks_for_a_signal_before_each_batch() -> None:
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)
    assert ".item()" in inspect.getsource(_TrainingEpochLoop._broadcast_sigterm_tensor)  # which waits for the device


def test_a_fused_optimizer_skips_a_step_that_is_marked() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    optimizer: Any = torch.optim.AdamW(linear.parameters(), lr=0.1, fused=True)

    def step(found_inf: float) -> list[torch.Tensor]:
        linear(torch.ones(1, 3)).sum().backward()
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        return [t.clone() for p in linear.parameters() for t in (p.detach(), *optimizer.state[p].values())]

    first = step(0.0)
    assert all(torch.equal(*pair) for pair in zip(first, step(1.0), strict=True))  # weights, moments and step count
    assert not any(torch.equal(*pair) for pair in zip(first, step(0.0), strict=True))
    assert "found_inf" not in inspect.signature(torch.optim.AdamW.step).parameters  # there is no public way to say so


def test_lightning_does_not_clip_for_a_fused_optimizer_that_says_what_it_is(module: Any, loader: Any) -> None:
    linear = nn.Linear(3, 2)
    optimizer: Any = torch.optim.AdamW(linear.parameters(), fused=True)
    assert optimizer._step_supports_amp_scaling is True
    precision = MixedPrecision("bf16-mixed", "cpu")
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        precision.clip_gradients(optimizer, 1.0)
    optimizer._step_supports_amp_scaling = False
    precision.clip_gradients(optimizer, 1.0)

    trained = module()
    clip = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value", "precision": "bf16-mixed"}
    pl.Trainer(accelerator="cpu", devices=1, max_steps=1, **clip, **QUIET).fit(trained, loader(1))
    assert trained.drain_skipped() == [False]


class PulledPlug(Exception):
    """Stands for a kill."""


def pull() -> None:
    raise PulledPlug


def test_lightning_finds_steps_by_counting_micro_batches(
    module: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validations are due after steps 2, 4 and 6; the micro-batches become a quarter as large after step 3."""

    def validated(folder: str) -> list[int]:
        with pytest.raises(PulledPlug):
            train(module(), folder, micro=4, at={4 * BATCH: pull})
        train(module(), folder, micro=1)
        return [row["step"] for row in read_rows(tmp_path / folder) if "val/cross_entropy" in row]

    assert validated("ours") == [2, 4, 6]
    monkeypatch.delattr(Checkpoints, "on_load_checkpoint")
    assert validated("lightning's") != [2, 4, 6]


@pytest.fixture
def alone() -> Iterator[Any]:
    """A mesh of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp_changes_the_class_of_a_module_for_good(alone: Any, llama: Any) -> None:
    model, ids = llama().requires_grad_(False), torch.arange(6).unsqueeze(0)
    expected, classes = model(ids).logits, [type(part) for part in model.modules()]
    shard(model, alone)
    changed = [(part, old) for part, old in zip(model.modules(), classes, strict=True) if type(part) is not old]
    assert len(changed) == 2  # the body and its one block
    for part, old in changed:
        assert type(part).__bases__ == (FSDPModule, old)
    public = {name for name in dir(FSDPModule) if not name.startswith("_")}
    inverse = {name for name in public if "remove" in name or "unwrap" in name or "undo" in name}
    assert inverse == set()

    unshard(model, keep=True)
    assert [type(part) for part in model.modules()] == classes
    assert not any(part._forward_pre_hooks or part._forward_hooks for part, _ in changed)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert torch.equal(model(ids).logits, expected)


class Body(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1


def test_a_module_that_was_compiled_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def traced(body: Body, length: int) -> bool:
        before = len(graphs)
        body(torch.ones(length))
        return len(graphs) > before

    torch._dynamo.reset()
    theirs, ours = Body(), Body()
    theirs.compile(backend=backend)
    assert traced(theirs, 6)
    assert traced(theirs, 5)
    assert [name for name in dir(nn.Module) if "compile" in name] == ["_compiled_call_impl", "compile"]

    torch._dynamo.reset()
    monkeypatch.setattr("distill.training.compile.BACKEND", backend)
    model: Any = SimpleNamespace(base_model=ours, _no_split_modules=None)
    with compiled_bodies(model):
        assert traced(ours, 6)
    assert not traced(ours, 5)
    torch._dynamo.reset()


def test_transformers_asks_whether_positions_restart_unless_it_is_told(llama: Any, monkeypatch: Any) -> None:
    ask, asked = masking_utils.find_packed_sequence_indices, []

    def counting(position_ids: torch.Tensor) -> Any:
        asked.append(position_ids)
        return ask(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", counting)
    model, ids = llama(), torch.arange(8).unsqueeze(0)
    expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert len(asked) == 1
    assert torch.equal(hidden_states(model, ids), expected)
    assert len(asked) == 1
    hidden_states(model, ids, position_ids=torch.arange(8).remainder(4).unsqueeze(0))
    assert len(asked) == 2  # on a CPU, where nothing waits
    assert masking_utils.find_packed_sequence_indices is counting
