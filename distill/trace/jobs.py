"""The training stages of a recipe as jobs to trace: what ``distill check`` forecasts, with the real parts of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from distill.core.errors import InputError
from distill.core.world import World
from distill.forecast.describe_plan import trainings
from distill.forecast.memory import MemoryModel
from distill.forecast.memory_limit import MemoryLimit
from distill.recipe import Recipe
from distill.stages.forecast import Training

MOST_GPUS = 8
"""GPUs of the simulated machine (``fake_cuda.NUM_GPUS``)."""
Source = Literal["live", "own weights", "hidden states", "some tokens", "none"]
"""Where the teacher's signal is from."""


@dataclass(frozen=True)
class Job:
    """One training stage.

    Attributes:
        name: of the stage.
        memory: how it trains, as the forecast sees it.
        training: its losses, adapters and grids.
        world: the processes that train together; this one is the first.
        num_micro_batches: of a step.
        has_documents: whether a row holds several documents that do not see each other.
    """

    name: str
    memory: MemoryModel
    training: Training
    world: World
    num_micro_batches: int
    has_documents: bool = False

    @property
    def source(self) -> Source:
        """Where the teacher's signal is from."""
        if self.memory.is_cached:
            return "hidden states" if self.memory.teacher is not None else "some tokens"
        if self.memory.teacher is not None:
            return "live"
        return "own weights" if self.memory.is_own_teacher else "none"


def jobs_of(recipe: Recipe, devices: int | None, num_nodes: int | None) -> Iterator[Job | str]:
    """A job per training stage, or a line that says why it cannot be traced.

    Args:
        recipe: checked before.
        devices: GPUs of a machine; None: those of the recipe, ``auto`` counts as one.
        num_nodes: machines; None: those of the recipe.

    Raises:
        InputError: the batch of a stage does not split into so many processes.
    """
    compute = recipe.compute
    local = devices or (1 if compute.devices == "auto" else compute.devices)
    if local > MOST_GPUS:
        raise InputError(f"--trace: {local} GPUs in a machine (at most {MOST_GPUS}); use --nodes for several machines")
    compute = compute.model_copy(update={"devices": local, "num_nodes": num_nodes or compute.num_nodes})
    if compute.accelerator == "cpu":
        compute = compute.model_copy(update={"accelerator": "auto"})
    limit = MemoryLimit(on_gpu=True, num_bytes=None, num_gpus=local)
    world = World(0, local * compute.num_nodes, 0, local)
    for name, training, memory, data in trainings(recipe.model_copy(update={"compute": compute}), limit):
        if memory is None:
            yield f"{name}: not traced, as the config of its student is not on this machine"
        elif memory.lacks_teacher:
            yield f"{name}: not traced, as the config of its teacher is not on this machine"
        elif compute.names_gpu_of_teacher or compute.teacher_device == "cpu":
            yield f"{name}: not traced, as its teacher is on another device (compute.teacher_device)"
        else:
            here = World() if training.is_trial else world
            num_micro = training.budget.batch_size // (memory.micro_batch_size * here.size)
            if not num_micro:
                raise InputError(f"stages.{name}: batch_size {training.budget.batch_size} is less than one per process")
            memory = replace(memory, on_cpu=False, writes_behind=False)
            yield Job(name, memory, training, here, num_micro, data.keeps_apart)
