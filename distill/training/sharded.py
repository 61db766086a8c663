"""Student and teacher shared out among the ranks: FSDP2, through Lightning's ``ModelParallelStrategy``.

Each block of a body is a unit whose weights are gathered when it runs. A body is entered by itself and its head a chunk
of tokens at a time, so the head is no unit: its weights are shards (``DTensor``), and whoever asks for the head
(:func:`distill.models.head.output_head`) gathers them for one micro-batch, with a gradient back to the shards.

A checkpoint is the same file as that of one process: it can be taken up by any number of ranks, sharded or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from distill.core.errors import InputError
from distill.quantization.fake_quant import fake_quant_layers
from distill.training.checkpoint import AtomicCheckpointIO, copied
from distill.training.sent import is_to_be_sent, send

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.training.module import DistillationModule


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all ranks where it is shared out."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Sharded(ModelParallelStrategy):
    """FSDP2 over all ranks, with checkpoints in one file that says nothing of shards.

    Args:
        num_ranks: of the run.
    """

    def __init__(self, num_ranks: int, **arguments: Any):
        super().__init__(
            data_parallel_size=num_ranks, tensor_parallel_size=1, save_distributed_checkpoint=False, **arguments
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands us the optimizer's state."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, gathered, on rank 0; what is frozen as it is, and copies of the small rest."""
        assert self.lightning_module is not None
        trained = {
            name for name, p in self.lightning_module.named_parameters(remove_duplicate=False) if p.requires_grad
        }
        state = self.lightning_module.state_dict()
        frozen = {name for name, value in state.items() if isinstance(value, DTensor)} - trained
        return {name: value if name in frozen else self._gathered(value) for name, value in state.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As an optimizer of whole parameters has it, on rank 0."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        moments = {
            number: {name: self._gathered(value) for name, value in of_parameter.items()}
            for number, of_parameter in state["state"].items()
        }
        return {"state": moments, "param_groups": state["param_groups"]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Rank 0 writes what was gathered, which is a copy already."""
        if self.is_global_zero:
            assert isinstance(self.checkpoint_io, AtomicCheckpointIO)
            self.checkpoint_io.write(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads the same file, mapped: only the pages of its own shards come into memory."""
        loaded: dict[str, Any] = torch.load(Path(checkpoint_path), map_location="cpu", weights_only=True, mmap=True)
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's share of each parameter."""
        assert self.lightning_module is not None
        ours, saved = self.lightning_module.state_dict(), checkpoint["state_dict"]
        if ours.keys() != saved.keys():
            raise InputError(f"the checkpoint is of another model: {sorted(ours.keys() ^ saved.keys())[:3]} differ")
        with torch.no_grad():
            for name, value in ours.items():
                if not isinstance(saved[name], DTensor):  # a frozen one stands in for itself
                    _share_of(saved[name], value, into=value)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's share of each moment."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                number: {
                    name: _share_of(value, parameters[number]) if value.ndim else value
                    for name, value in of_parameter.items()
                }
                for number, of_parameter in saved["state"].items()
            }
            optimizer.load_state_dict({"state": moments, "param_groups": saved["param_groups"]})

    def _gathered(self, value: Any) -> Any:
        """On rank 0 a copy of the whole of it, in the machine's own memory; all ranks must ask."""
        if not isinstance(value, DTensor):
            return copied(value)
        full = value.full_tensor()
        return full.cpu() if self.is_global_zero else full.new_empty(0)


def _share_of(full: Tensor, like: Tensor, into: Tensor | None = None) -> Tensor:
    """``full`` shared out as ``like`` is; no rank talks to another."""
    if isinstance(like, DTensor):
        full = distribute_tensor(full.to(like.to_local().device), like.device_mesh, like.placements, src_data_rank=None)
    if into is not None:
        local([into])[0].copy_(local([full])[0])
    return full


def shard_module(module: DistillationModule) -> None:
    """Share out student, learned maps and a teacher beside the student, where the strategy is :class:`Sharded`.

    Raises:
        InputError: the stage has something that shards cannot do.
    """
    strategy = module.trainer.strategy
    if not isinstance(strategy, Sharded) or isinstance(module.student.base_model, FSDPModule):
        return
    if module.on_policy is not None:
        raise InputError("compute.strategy: fsdp cannot write the student's own sequences (on_policy); use ddp")
    if any(p._backward_hooks for p in module.student.parameters()):
        raise InputError("compute.strategy: fsdp cannot hold a mask of zeros; use ddp")
    mesh = strategy.device_mesh["data_parallel"]
    # a grid is taken of the fp32 weights that are shipped, so these must not be gathered in another type
    half = "bf16" in str(module.trainer.precision) and not fake_quant_layers(module.student)
    shard(module.student, mesh, torch.bfloat16 if half else None)
    for projection in module.states.projections.values() if module.states is not None else ():
        fully_shard(projection, mesh=mesh)
    if module.teacher is not None:
        module.teacher.shard(mesh)


def shard(model: PreTrainedModel, mesh: Any, compute_dtype: torch.dtype | None = None) -> None:
    """Share a causal model out over a mesh, in place.

    Args:
        model: whole on every rank, or on the first, and on the others of the same build on the device "meta".
        mesh: of one dimension.
        compute_dtype: in which weights are gathered; None is their own.
    """
    body: Any = model.base_model
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
    blocks = set(model._no_split_modules or ())
    device, to_be_sent = torch.empty(0, device=mesh.device_type).device, is_to_be_sent(model)
    for block in [part for part in body.modules() if type(part).__name__ in blocks]:
        if to_be_sent:
            send(block, device)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if to_be_sent:
        send(model, device)
    names = {id(p): name for name, p in body.named_parameters()}
    head = model.get_output_embeddings()
    tied = {name: names.get(id(p)) for name, p in head.named_parameters()}  # by the body, which is about to be shared
    # the root is let go of after a forward too: it holds the embeddings, often a tenth of the model
    fully_shard(body, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for name, in_body in tied.items():
        owner, _, leaf = name.rpartition(".")
        part, old = head.get_submodule(owner), head.get_parameter(name)
        part._parameters[leaf] = body.get_parameter(in_body) if in_body else _shards(old, mesh)


def _shards(parameter: nn.Parameter, mesh: Any) -> nn.Parameter:
    mine = distribute_tensor(parameter.detach().to(mesh.device_type), mesh, [Shard(0)], src_data_rank=None)
    return nn.Parameter(mine, requires_grad=parameter.requires_grad)


def unshard(model: PreTrainedModel, *, keep: bool) -> None:
    """Make a shared-out model a plain one again, in place, on the CPU; all ranks must call it.

    Args:
        model: of :func:`shard`.
        keep: whether this rank wants it; else its weights are gone.
    """
    gathered: dict[int, nn.Parameter] = {}
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
            state = part._get_fsdp_state()
            for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
                handle.remove()
            part.__class__ = type(part).__bases__[1]  # FSDP2 mixes a class in, and offers no way back
    for part in model.modules():
        for name, p in part._parameters.items():
            if isinstance(p, DTensor):
                if id(p) not in gathered:
                    full = p.detach().full_tensor()
                    plain = full.cpu() if keep else full.new_empty(0)
                    gathered[id(p)] = nn.Parameter(plain, requires_grad=p.requires_grad)
                part._parameters[name] = gathered[id(p)]
