"""What a training stage holds in the memory of one process, counted from the configs of its models.

    student      = w P          P parameters of w bytes: 4, or 2 in bf16-true; gradients = w T, optimizer = 2 w T for
                                the T of them that are trained (AdamW's two moments)
    checkpoint   = 3 w T        on a CPU, where a copy is written behind the training; a GPU's lies outside of it
    teacher      = w' P'        of 4 bytes on a CPU, of its file's on a GPU
    copies       = c M          M weights of the body's linear layers, as they are multiplied: c = 2 under autocast,
                                4 (2 in half precision) where they are fake-quantized, else 0
    activations  = t L block    t tokens of a micro-batch, L blocks
    block        = norms (residual stream in, normalised, out) + attention (2 queries + 2 keys, with the values and the
                                output) + MLP (both branches, the activation, the product), what autograd keeps of each
    workspace    = the larger of what the losses need when all activations are there, and what a block's gradient does

With gradient checkpointing ``activations = t L hidden`` and a whole block is in the workspace. Under fsdp student,
teacher, gradients and optimizer are sharded over the processes; a block and both heads are whole, and before that
the first process holds what it reads whole in its machine's own memory. Beside it stand the libraries and, on a GPU,
its context and what the allocator cannot use (a GB or two).

For blocks of Llama's build it is within a few percent (``benchmarks/forecast.py`` compares it with measured bytes) and
near for others; losses on inner states, sequences that the student writes itself, attention masks, adapters' own
activations and a compiler's plan are not counted.

Source: the way of counting is that of Korthikanti et al. 2022, arXiv 2205.05198, section 4, without the attention
matrix, which fused attention never writes down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from math import prod
from typing import Any, Literal

from distill.losses.chunks import numbers_at_once, tokens_at_once
from distill.models.layouts import layout_of
from distill.models.lora import LoraSpec
from distill.pruning.layout import Layout, Parameter, shape

Config = Mapping[str, Any]
Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes in one process while a stage trains, at its peak."""

    student: float
    gradients: float
    optimizer: float
    teacher: float
    copies: float
    activations: float
    workspace: float
    checkpoint: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(astuple(self))


@dataclass(frozen=True)
class MemoryModel:
    """What decides the memory of a training stage.

    Attributes:
        student: its config.
        teacher: the config of a teacher in this process' memory, or None.
        teacher_bytes: of a parameter of it.
        head_only: whether the teacher's body is elsewhere, on another device or in a cache.
        is_cached: whether it is in a cache.
        lora: adapters that are trained in place of the weights, or None.
        quantized: whether the student computes with fake-quantized weights.
        rounds_head: whether the student's output head is fake-quantized too.
        is_in_place: whether it has one loss on logits, which overwrites them and so needs the least memory.
        precision: of the student's arithmetic.
        micro_batch_size: sequences at once.
        accumulates: whether a step has several micro-batches.
        sequence_length: tokens of a sequence.
        checkpointing: whether activations are computed again.
        on_cpu: where it runs.
        num_processes: that train together.
        sharded: whether they share the models out.
        is_single_process: whether no other process may ever take part.
        lacks_teacher: whether there is a teacher besides, of unknown size.
        is_own_teacher: whether the student, as it starts, is its own teacher.
        writes_behind: whether training goes on from a copy of what a checkpoint holds.
    """

    student: Config
    teacher: Config | None
    teacher_bytes: int
    head_only: bool
    lora: LoraSpec | None
    quantized: bool
    is_in_place: bool
    precision: Precision
    micro_batch_size: int
    accumulates: bool
    sequence_length: int
    checkpointing: bool
    on_cpu: bool
    num_processes: int = 1
    sharded: bool = False
    is_single_process: bool = False
    is_cached: bool = False
    rounds_head: bool = False
    lacks_teacher: bool = False
    is_own_teacher: bool = False
    writes_behind: bool = False

    @property
    def is_taught(self) -> bool:
        """Whether there is a teacher of any kind."""
        return self.teacher is not None or self.is_cached or self.is_own_teacher or self.lacks_teacher

    def trained(self) -> int:
        """Parameters that are trained."""
        if self.lora is None:
            return Shape(self.student).parameters
        return self.lora.r * Shape(self.student).ends_of_adapted(self.lora.target_modules)

    def checkpoint_bytes(self) -> int:
        """Of a checkpoint: what is trained, and the optimizer's moments of it."""
        return 3 * self.weight_bytes * self.trained()

    def read_bytes(self) -> int:
        """Of both models as they are read, before anything of them is sharded."""
        return FP32 * Shape(self.student).parameters + self._teacher()

    @property
    def weight_bytes(self) -> int:
        """Of a parameter of the student."""
        return 2 if self.precision == "bf16-true" else FP32

    def memory(self) -> Memory:
        """The forecast."""
        of, tokens = Shape(self.student), self.micro_batch_size * self.sequence_length
        shares = self.num_processes if self.sharded else 1
        width, trained = self.weight_bytes, self.trained()
        gradients = width * trained / shares
        half = self.precision != "32-true"
        # shards are gathered in half precision as they are, so autocast copies nothing
        multiplied_as_copies = self.quantized or (self.precision == "bf16-mixed" and not self.sharded)
        copies = (2.0 if half else FP32) * of.body_weights if multiplied_as_copies else 0.0
        # shards are gathered in half precision, the embeddings among them, so the residual stream is in it as well
        is_half_stream = self.sharded and self.precision == "bf16-mixed" and not self.quantized
        activations: Precision = "bf16-true" if is_half_stream else self.precision
        stream = 2 if activations == "bf16-true" else FP32
        block = tokens * of.block_bytes(activations, self.sequence_length)
        kept = tokens * (stream * of.hidden + of.last_norm_bytes(activations))
        kept += of.layers * (tokens * stream * of.hidden if self.checkpointing else block)
        losses = self._losses(of, tokens)
        backward: float = tokens * ((2 if half else FP32) * of.neurons + FP32 * of.hidden)
        if self.checkpointing:
            backward += block - tokens * stream * of.hidden  # its input is among what is kept
            copies, backward = 0.0, backward + copies / of.layers
        if not self.accumulates and (self.num_processes == 1 or self.sharded):
            backward -= gradients  # those of the step before are freed by then, and not before its losses
        if self.sharded:
            losses += (2 if self.lora is None else 1) * FP32 * of.head_weights
            backward += 2 * FP32 * of.body_weights / of.layers
        return Memory(
            student=width * of.parameters / shares,
            gradients=gradients,
            optimizer=2 * width * trained / shares,
            teacher=self._teacher() / (1 if self.head_only else shares),
            copies=copies,
            activations=kept,
            workspace=max(losses, backward + self._gradients_of_losses(of, tokens)),
            checkpoint=self.checkpoint_bytes() if self.writes_behind and self.on_cpu else 0.0,
        )

    def _teacher(self) -> int:
        if self.teacher is None:
            return 0
        of = Shape(self.teacher)
        return self.teacher_bytes * (of.head_weights if self.head_only else of.parameters)

    def _losses(self, of: Shape, tokens: int) -> float:
        """When the logits of a chunk are there: both models' buffers, and the gradients that losses write at once."""
        chunk = tokens_at_once(max(of.vocabulary, of.hidden), tokens, on_cpu=self.on_cpu)
        logits, half = chunk * of.vocabulary, self.precision != "32-true"
        rows = min(logits, numbers_at_once(1, on_cpu=self.on_cpu))
        tiles = 1 if self.is_in_place else 6 if self.is_taught else 2  # distributions and gradients of a tile
        need = FP32 * (logits + tiles * rows) + tokens * self.weight_bytes * of.hidden
        if self.rounds_head:
            need += self.weight_bytes * of.head_weights  # as it is multiplied
        if half:
            need += 2 * logits + 2 * of.head_weights * (1 if self.lora else 2)
        if self.teacher is not None:
            need += FP32 * logits + 2 * tokens * self.teacher_bytes * Shape(self.teacher).hidden
        elif self.is_own_teacher:
            need += FP32 * logits + 2 * tokens * (2 if half else FP32) * of.hidden
        return need + self._gradients_of_losses(of, tokens)

    def _gradients_of_losses(self, of: Shape, tokens: int) -> float:
        """Of the hidden states and of the head, fp32, until the backward pass has handed them on."""
        return FP32 * (tokens * of.hidden + (0 if self.lora else of.head_weights))


class Shape:
    """A model's sizes, read from its config by its layout.

    Args:
        config: of an architecture that has a layout.
    """

    def __init__(self, config: Config):
        layout: Layout = layout_of(config)
        self._sizes = sizes = layout.sizes(config)
        self._rows = [row for row in layout.parameters if row.exists(config)]
        self._block = [row for row in self._rows if "{layer}" in row.path]
        self.parameters = layout.count(config)
        self.hidden, self.layers, self.vocabulary = sizes["hidden_channels"], sizes["layers"], sizes["vocabulary"]
        self.head_weights = self.vocabulary * self.hidden
        chosen = config.get("num_experts_per_tok", 1) if "experts" in sizes else 1
        self.neurons = sizes["mlp_neurons"] * chosen
        # the one activation that transformers computes in steps, and the attention that cannot be fused
        self._activation_steps = 5 if config.get("activation_function", config.get("hidden_act")) == "gelu_new" else 2
        self._writes_attention = bool(config.get("attn_logit_softcapping"))
        self.queries = sizes["attention_heads"] * sizes["head_dim"]
        self.keys = sizes["kv_groups"] * sizes["head_dim"]

    @property
    def _matrices(self) -> list[Parameter]:
        return [row for row in self._block if len(row.axes) >= 2]

    @property
    def body_weights(self) -> int:
        """Numbers in the matrices of all blocks."""
        return self.layers * sum(prod(shape(row, self._sizes)) for row in self._matrices)

    def ends_of_adapted(self, targets: str | tuple[str, ...]) -> int:
        """Inputs and outputs of the blocks' linear layers that ``lora.target_modules`` names: an adapter of rank 1."""
        rows = [row for row in self._matrices if _is_named(row.path.removesuffix(".weight"), targets)]
        return self.layers * sum(sum(shape(row, self._sizes)[-2:]) for row in rows)

    def block_bytes(self, precision: Precision, length: int) -> int:
        """What autograd keeps of a block, a token of a sequence of so many."""
        product = FP32 if precision == "32-true" else 2
        branches = max(1, sum(list(_flat(row)).count("mlp_neurons") for row in self._matrices) - 1)
        norms = [row for row in self._block if len(row.axes) == 1 and row.path.endswith("norm.weight")]
        norms += [
            row for row in self._block if len(row.axes) == 1 and row.path.endswith(("ln_1.weight", "ln_2.weight"))
        ]
        heads = self._sizes["attention_heads"]
        attention = product * (2 * self.queries + 2 * self.keys)
        attention += FP32 * heads * (2 * length if self._writes_attention else 1)
        # the branch that is activated, in its steps, and the other one with their product
        mlp = product * self.neurons * (self._activation_steps + 2 * (branches - 1))
        return attention + mlp + sum(self._norm(row, precision) for row in norms)

    def last_norm_bytes(self, precision: Precision) -> int:
        """What autograd keeps of the norm after the last block, a token; its output is what the losses read."""
        return {"32-true": 12, "bf16-mixed": 12, "bf16-true": 8}[precision] * self.hidden

    def _norm(self, row: Parameter, precision: Precision) -> int:
        """Input, normalised input and output of a norm; a fused LayerNorm keeps no normalised input."""
        fused = any(other.path == row.path.replace(".weight", ".bias") for other in self._block)
        if row.axes != ("hidden_channels",):  # over queries or keys, whose output nothing keeps
            width = self.keys if ".k_" in row.path else self.queries
            return width * {"32-true": 8, "bf16-mixed": 6, "bf16-true": 8}[precision]
        if precision == "32-true":
            return self.hidden * (8 if fused else 12)
        if precision == "bf16-true":
            return self.hidden * (4 if fused else 8)
        readers = sum("hidden_channels" in _flat(other) for other in self._matrices) - 2  # each casts its input anew
        return self.hidden * ((4 if fused else 8) + readers)


def _flat(row: Parameter) -> list[str]:
    """The axes of all dimensions, fused ones one by one."""
    return [axis for dimension in row.axes for axis in ([dimension] if isinstance(dimension, str) else dimension)]


def _is_named(module: str, targets: str | tuple[str, ...]) -> bool:
    """As peft reads its ``target_modules``: a keyword, a pattern of the whole name, or ends of names."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == end or module.endswith(f".{end}") for end in targets)
