"""Two processes share out a model that only the first has read, as they do one that both have read."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from distill.core.errors import DistillError, InputError
from distill.core.world import World
from distill.models.kv_cache import NAME
from distill.models.load import empty_model, load_empty, new_config, new_model
from distill.models.lora import LoraSpec
from distill.quantization import Int8Channel, IntGroup
from distill.quantization.static_int8 import StaticInt8
from distill.stages.models import hold_mask, load_trainable
from distill.stages.session import Session
from distill.training.assemble import assemble
from distill.training.sent import is_to_be_sent, send
from distill.training.sharded import local, shard
from distill.training.spec import ComputeSpec

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 33}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 33, "n_positions": 8}
LEARNED = IntGroup(bits=3, group_size=8, scale="learned")
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2, tied": (GPT2, {"gradient_checkpointing": True}),
    "LoRA": (LLAMA | {"tie_word_embeddings": True}, {"lora": LoraSpec(r=2)}),
    "fake-quant, LoRA": (LLAMA, {"quantizer": LEARNED, "lora": LoraSpec(r=2)}),
    "fake-quant, static inputs": (LLAMA, {"quantizer": Int8Channel(), "activations": StaticInt8()}),
}


def in_two(work: Callable[[int], None], folder: Path) -> None:
    """Run a function of this module in two processes that meet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preloaded"])
    processes = [context.Process(target=_met, args=(work, rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def _met(work: Callable[[int], None], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "met"), 2), rank=rank, world_size=2)
    work(rank)
    dist.destroy_process_group()


def _is_as_read(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for way, (keys, wrapping) in WAYS.items():
        config = new_config(keys)
        torch.manual_seed(0)
        read = assemble(new_model(config, seed=3), **wrapping).model
        torch.manual_seed(rank)  # adapters are drawn by chance, which may be another one here
        sent = assemble(new_model(config, seed=3) if rank == 0 else empty_model(config), **wrapping).model
        assert all(p.is_meta == (rank == 1) for p in (sent.get_input_embeddings().weight, *_matrices(sent))), way
        for model in (read, sent) if rank == 0 else (read,):
            for name, buffer in model.named_buffers():
                if name.endswith("input_scale"):
                    buffer.fill_(0.25)  # as a calibration would
        shard(read, mesh)
        shard(sent, mesh)
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (sent, read))
            assert ours.keys() == theirs.keys(), way
            for name, value in theirs.items():
                assert type(ours[name]) is type(value), (way, name)
                assert ours[name].dtype == value.dtype, (way, name)
                assert ours[name].requires_grad == value.requires_grad, (way, name)
                assert torch.equal(*local([ours[name], value])), (way, name)


def _matrices(model: Any) -> list[Any]:
    """Of the blocks, but for adapters, which have numbers from the start."""
    return [p for name, p in model.base_model.named_parameters() if p.ndim == 2 and "lora_" not in name]


def test_what_is_sent_is_what_was_read(tmp_path: Path) -> None:
    in_two(_is_as_read, tmp_path)


def _is_refused(rank: int) -> None:
    model = new_model(new_config(LLAMA), seed=0) if rank == 0 else empty_model(new_config(LLAMA | {"vocab_size": 34}))
    assert is_to_be_sent(model)
    with pytest.raises(DistillError, match="the processes have built different models"):
        send(model, torch.device("cpu"))


def test_another_build_is_refused_by_both(tmp_path: Path) -> None:
    in_two(_is_refused, tmp_path)


@pytest.mark.parametrize(
    ("strategy", "rank", "reads"), [("fsdp", 0, True), ("fsdp", 1, False), ("ddp", 1, True), ("auto", 1, True)]
)
def test_who_reads_a_model(strategy: Any, rank: int, reads: bool, tmp_path: Path) -> None:
    place = SimpleNamespace(compute=ComputeSpec(strategy=strategy), world=World(rank, 2, rank, 2))
    session = SimpleNamespace(is_sent_models=Session.is_sent_models.fget(place))  # type: ignore[attr-defined]
    new_model(new_config(LLAMA), seed=0).save_pretrained(tmp_path)
    context: Any = SimpleNamespace(session=session)
    assert load_trainable(context, str(tmp_path)).device.type == ("cpu" if reads else "meta")


def test_a_model_without_numbers_attends_as_its_config_says(tmp_path: Path) -> None:
    config = new_config(LLAMA | {"head_dim": 32})
    config.kv_cache_type = "q8_0"
    config.save_pretrained(tmp_path)
    empty: Any = load_empty(str(tmp_path))
    assert empty.config._attn_implementation == NAME
    assert [layer.self_attn.kv_cache_type for layer in empty.model.layers] == ["q8_0"]
    config.quantization_config = {"quant_method": "compressed-tensors"}
    config.save_pretrained(tmp_path)
    assert load_empty(str(tmp_path)) is None


def test_a_mask_is_refused_before_anything_is_wrapped() -> None:
    masked = SimpleNamespace(lineage=lambda: SimpleNamespace(mask="2:4"))
    place = SimpleNamespace(compute=ComputeSpec(strategy="fsdp"), world=World(1, 2, 1, 2), artifact=lambda name: masked)
    context: Any = SimpleNamespace(session=place)
    with pytest.raises(InputError, match=r"sparse: its weights are masked, which compute.strategy: fsdp cannot hold"):
        hold_mask(context, "sparse", empty_model(new_config(LLAMA)), lora=False)
