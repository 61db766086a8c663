"""Student and teacher sharded over the ranks: FSDP2, through Lightning's ``ModelParallelStrategy``.

Each block of a body is a unit whose weights are gathered when it runs. The head is called outside of the body, chunk by
chunk, so it is not a unit: its weights are shards (``DTensor``), and
:func:`distill.models.head.output_head` gathers them for one micro-batch, with a gradient back to the shards.

A checkpoint is the same file as that of one process, so any number of ranks can load it, sharded or not.
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

    from distill.training.teacher import Teacher


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The part of each tensor that this rank holds."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Sharded(ModelParallelStrategy):
    """FSDP2 over all ranks, with unsharded checkpoints in one file.

    Args:
        num_ranks: number of processes of the run.
    """

    def __init__(self, num_ranks: int, **arguments: Any):
        super().__init__(
            data_parallel_size=num_ranks, tensor_parallel_size=1, save_distributed_checkpoint=False, **arguments
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning gives the optimizer's state to :meth:`load_optimizer_state_dict`."""
        return True

    def shard(
        self, student: PreTrainedModel, maps: Iterable[nn.Module], teacher: Teacher | None, *, bf16: bool
    ) -> None:
        """Shard student, projections and teacher in place; later calls have no effect.

        Args:
            student: the model that is trained.
            maps: learned projections of the losses on hidden states.
            teacher: shards its own model.
            bf16: whether the student computes in bf16.

        Raises:
            InputError: the student is sparse: gradient hooks keep its zero weights at zero.
        """
        if isinstance(student.base_model, FSDPModule):
            return
        if any(p._backward_hooks for p in student.parameters()):
            raise InputError("compute.strategy: fsdp cannot keep the zero weights of a sparse student at zero; use ddp")
        mesh = self.device_mesh["data_parallel"]
        # fake quantization computes its grid from the fp32 weights that are exported, so do not gather them in bf16
        half = bf16 and not fake_quant_layers(student)
        shard(student, mesh, torch.bfloat16 if half else None)
        for linear in maps:
            fully_shard(linear, mesh=mesh)
        if teacher is not None:
            teacher.shard(mesh)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state dict to save. On rank 0, trained weights are gathered on the CPU and all other state is copied;
        frozen weights stay shards and are removed later."""
        assert self.lightning_module is not None
        trained = {
            name for name, p in self.lightning_module.named_parameters(remove_duplicate=False) if p.requires_grad
        }
        state = self.lightning_module.state_dict()
        frozen = {name for name, value in state.items() if isinstance(value, DTensor)} - trained
        return {name: value if name in frozen else self._gathered(value) for name, value in state.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """On rank 0 the gathered state of the optimizer, with unsharded parameters."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        moments = {
            number: {name: self._gathered(value) for name, value in of_parameter.items()}
            for number, of_parameter in state["state"].items()
        }
        return {"state": moments, "param_groups": state["param_groups"]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Rank 0 writes the gathered state, which is already a copy."""
        if self.is_global_zero:
            assert isinstance(self.checkpoint_io, AtomicCheckpointIO)
            self.checkpoint_io.write(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank maps the same file, so that only the pages of its own shards are read into memory."""
        loaded: dict[str, Any] = torch.load(Path(checkpoint_path), map_location="cpu", weights_only=True, mmap=True)
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy this rank's shard of each parameter."""
        assert self.lightning_module is not None
        ours, saved = self.lightning_module.state_dict(), checkpoint["state_dict"]
        if ours.keys() != saved.keys():
            raise InputError(f"the checkpoint is of another model: {sorted(ours.keys() ^ saved.keys())[:3]} differ")
        with torch.no_grad():
            for name, value in ours.items():
                # frozen weights are DTensors: they were put in by on_load_checkpoint and need no copy
                if not isinstance(saved[name], DTensor):
                    _shard_of(saved[name], value, into=value)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's shard of each moment."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                number: {
                    name: _shard_of(value, parameters[number]) if value.ndim else value
                    for name, value in of_parameter.items()
                }
                for number, of_parameter in saved["state"].items()
            }
            optimizer.load_state_dict({"state": moments, "param_groups": saved["param_groups"]})

    def _gathered(self, value: Any) -> Any:
        """On rank 0 a copy of the whole value on the CPU; all ranks must call it."""
        if not isinstance(value, DTensor):
            return copied(value)
        full = value.full_tensor()
        return full.cpu() if self.is_global_zero else full.new_empty(0)


def _shard_of(full: Tensor, like: Tensor, into: Tensor | None = None) -> Tensor:
    """``full`` sharded as ``like`` is, without communication between ranks."""
    if isinstance(like, DTensor):
        full = distribute_tensor(full.to(like.to_local().device), like.device_mesh, like.placements, src_data_rank=None)
    if into is not None:
        local([into])[0].copy_(local([full])[0])
    return full


def shard(model: PreTrainedModel, mesh: Any, compute_dtype: torch.dtype | None = None) -> None:
    """Shard a causal model over a mesh, in place.

    Args:
        model: with weights on every rank; or with weights on rank 0, and on the meta device on the other ranks.
        mesh: device mesh of one dimension.
        compute_dtype: dtype in which weights are gathered; None is that of the weights.
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
    # read before the body's parameters are replaced
    tied = {name: names.get(id(p)) for name, p in head.named_parameters()}
    # the root is freed after a forward pass too: it holds the embeddings, often a tenth of the model
    fully_shard(body, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for name, in_body in tied.items():
        owner, _, leaf = name.rpartition(".")
        part, old = head.get_submodule(owner), head.get_parameter(name)
        part._parameters[leaf] = body.get_parameter(in_body) if in_body else _shards(old, mesh)


def _shards(parameter: nn.Parameter, mesh: Any) -> nn.Parameter:
    mine = distribute_tensor(parameter.detach().to(mesh.device_type), mesh, [Shard(0)], src_data_rank=None)
    return nn.Parameter(mine, requires_grad=parameter.requires_grad)


def unshard(model: PreTrainedModel, *, keep: bool) -> None:
    """Turn a sharded model into a plain one again, in place, on the CPU; all ranks must call it.

    Args:
        model: a model that :func:`shard` has sharded.
        keep: whether this rank needs the weights; otherwise they are dropped.
    """
    gathered: dict[int, nn.Parameter] = {}
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
            state = part._get_fsdp_state()
            for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
                handle.remove()
            # Private API of torch: ``fully_shard`` makes the module an instance of a new class, FSDP<name>, whose bases
            # are FSDPModule and the module's own class, and offers no way back. Otherwise the model would keep that
            # class and its hooks: merging adapters, converting and saving check classes and call forward, which would
            # gather weights from ranks that have already ended.
            part.__class__ = type(part).__bases__[1]
    for part in model.modules():
        for name, p in part._parameters.items():
            if isinstance(p, DTensor):
                if id(p) not in gathered:
                    full = p.detach().full_tensor()
                    plain = full.cpu() if keep else full.new_empty(0)
                    gathered[id(p)] = nn.Parameter(plain, requires_grad=p.requires_grad)
                part._parameters[name] = gathered[id(p)]
