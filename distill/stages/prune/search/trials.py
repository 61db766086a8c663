"""How good a candidate is: cut and measured, or trained for a while and measured, against the uncut model.

Better means less KL from the uncut model on calibration sequences; the validation text plays no part in the choice.
Each training has its own checkpoints, so that a kill loses little.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from distill.core.artifact import hash_of
from distill.core.run_folder import CHECKPOINTS
from distill.core.world import SINGLE_PROCESS
from distill.evaluation.quality import measure_quality
from distill.losses import ForwardKL
from distill.models.load import move
from distill.models.weight_files import prune_folder
from distill.pruning.base import Scores
from distill.pruning.plan import Plan, plan
from distill.pruning.search import Candidate, SearchSpace
from distill.pruning.surgery import apply
from distill.stages.models import load_frozen, load_on_device
from distill.stages.prune.search.measurement_cache import MeasurementCache
from distill.stages.prune.search.spec import SearchSpec
from distill.stages.session import StageContext
from distill.stages.train import train
from distill.training.assemble import assemble, disassemble
from distill.training.live_teacher import LiveTeacher
from distill.training.trainer import resolve_device, resolve_teacher


class Trials:
    """Candidates of one search, tried.

    Args:
        context: of the stage.
        spec: what to look at.
        reference: the uncut model.
        space: the architectures.
        scores: of all axes of the search.
        batch_size: calibration sequences per forward pass.
        cache: what was measured before.
    """

    def __init__(
        self,
        context: StageContext,
        spec: SearchSpec,
        reference: str,
        space: SearchSpace,
        scores: Scores,
        batch_size: int,
        cache: MeasurementCache,
    ):
        self.context, self.spec, self.reference, self.space = context, spec, reference, space
        self._scores, self._batch_size, self._cache = scores, batch_size, cache

    def along_axis(self, key: str, size: int) -> dict[str, Any]:
        """How far the model is from itself when it is cut along one axis."""
        return self._cache.get("alone", f"{key}={size}", lambda: self._cut({key: size}))

    def cut(self, candidate: Candidate) -> dict[str, Any]:
        """How far a candidate is from the uncut model, right after the cut."""
        return self._cache.get("cut", candidate.name, lambda: self._cut(candidate.keep))

    def trained(self, candidate: Candidate) -> dict[str, Any]:
        """How far a candidate is from the uncut model after a short training on its logits, and what that took."""
        return self._cache.get("trained", candidate.name, lambda: self._train(candidate))

    def end_of_cuts(self) -> None:
        """Free the model that was cut: training loads it once more, where and how ``compute`` wants a teacher."""
        self.__dict__.pop("_whole", None)

    def _plan(self, keep: dict[str, int]) -> Plan:
        return plan(self._scores, self.spec.keep(keep), self.space.layout, self.space.config)

    def _cut(self, keep: dict[str, int]) -> dict[str, Any]:
        return self._loss(apply(self._whole, self._plan(keep), self.space.layout), self._whole)

    def _train(self, candidate: Candidate) -> dict[str, Any]:
        assert self.spec.train is not None
        session, folder = self.context.session, self.context.folder / CHECKPOINTS / candidate.name
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(int(hash_of(session.seed, self.context.name, candidate.name), 16) % 2**63)
        location = session.artifact(self.reference).location
        start = prune_folder(location, self._plan(candidate.keep), self.space.layout, torch.float32)
        student = assemble(start, gradient_checkpointing=session.compute.gradient_checkpointing)
        # the other processes do not take part in a search
        single = replace(session, world=SINGLE_PROCESS)
        own = replace(self.context, session=single, name=f"{self.context.name}/{candidate.name}", folder=folder)
        losses = [ForwardKL()]
        figures = train(own, student, losses, self.spec.train, teacher=self._teacher, scored_by=self.reference)
        trained = move(disassemble(student), resolve_device(session.compute))
        return self._loss(trained, self._teacher.model) | figures

    def _loss(self, model: PreTrainedModel, whole: PreTrainedModel) -> dict[str, Any]:
        quality = measure_quality(model, whole, self._batches)
        return {"kl": quality.kl_to_teacher, "perplexity": quality.perplexity}

    @cached_property
    def _whole(self) -> PreTrainedModel:
        """The uncut model, while cuts are measured against it."""
        return load_on_device(self.context, self.context.session.artifact(self.reference).location)

    @cached_property
    def _teacher(self) -> LiveTeacher:
        """The uncut model as the teacher of every training."""
        device, _ = resolve_teacher(self.context.session.compute)
        teacher = LiveTeacher(load_frozen(self.context, self.reference), device)
        teacher.move(device)  # a search that goes on may measure before it trains
        return teacher

    @cached_property
    def _batches(self) -> list[Any]:
        corpus = self.context.session.corpus()
        num_sequences = min(self.spec.num_sequences, corpus.calibration_sequences)
        return list(corpus.calibration_loader(num_sequences, self._batch_size))
