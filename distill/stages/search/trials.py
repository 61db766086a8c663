"""How good a candidate is: cut and measured, or trained for a while and measured, against the uncut model.

Better means less KL from the uncut model on calibration sequences; the validation text plays no part in the choice.
Each training has its own checkpoints, so that a kill loses little.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distill.core.artifact import hash_of
from distill.core.run import CHECKPOINTS
from distill.core.world import ALONE
from distill.stages.base import StageContext
from distill.stages.search.found import Found
from distill.stages.search.spec import SearchSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.pruning.base import Scores
    from distill.pruning.plan import Plan
    from distill.pruning.search import Candidate, Space
    from distill.training.live_teacher import LiveTeacher


class Trials:
    """Candidates of one search, tried.

    Args:
        context: of the stage.
        spec: what to look at.
        reference: the uncut model.
        space: the architectures.
        scores: of all axes of the search.
        batch_size: calibration sequences a forward pass.
        found: what was measured before.
    """

    def __init__(
        self,
        context: StageContext,
        spec: SearchSpec,
        reference: str,
        space: Space,
        scores: Scores,
        batch_size: int,
        found: Found,
    ):
        self.context, self.spec, self.reference, self.space = context, spec, reference, space
        self._scores, self._batch_size, self._found = scores, batch_size, found

    def alone(self, key: str, size: int) -> dict[str, Any]:
        """How far the model is from itself when it is cut along one axis."""
        return self._found.get("alone", f"{key}={size}", lambda: self._cut({key: size}))

    def cut(self, candidate: Candidate) -> dict[str, Any]:
        """How far a candidate is from the uncut model, right after the cut."""
        return self._found.get("cut", candidate.name, lambda: self._cut(candidate.keep))

    def trained(self, candidate: Candidate) -> dict[str, Any]:
        """How far a candidate is from the uncut model after a short training on its logits, and what that took."""
        return self._found.get("trained", candidate.name, lambda: self._train(candidate))

    def end_of_cuts(self) -> None:
        """Free the model that was cut: training loads it once more, where and how ``compute`` wants a teacher."""
        self.__dict__.pop("_whole", None)

    def _plan(self, keep: dict[str, int]) -> Plan:
        from distill.pruning.plan import plan

        return plan(self._scores, self.spec.keep(keep), self.space.layout, self.space.config)

    def _cut(self, keep: dict[str, int]) -> dict[str, Any]:
        from distill.pruning.surgery import apply

        return self._loss(apply(self._whole, self._plan(keep), self.space.layout), self._whole)

    def _train(self, candidate: Candidate) -> dict[str, Any]:
        import torch

        from distill.losses import ForwardKL
        from distill.models.load import move
        from distill.models.shards import carve_folder
        from distill.stages.train import train
        from distill.training.assemble import assemble, disassemble
        from distill.training.trainer import resolve_device

        assert self.spec.train is not None
        session, folder = self.context.session, self.context.folder / CHECKPOINTS / candidate.name
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(int(hash_of(session.seed, self.context.name, candidate.name), 16) % 2**63)
        location = session.artifact(self.reference).location
        start = carve_folder(location, self._plan(candidate.keep), self.space.layout, torch.float32)
        student = assemble(start, gradient_checkpointing=session.compute.gradient_checkpointing)
        # the other processes do not take part in a search
        alone = replace(session, world=ALONE)
        own = replace(self.context, session=alone, name=f"{self.context.name}/{candidate.name}", folder=folder)
        figures = train(own, student, [ForwardKL()], self.spec.train, teacher=self._teacher)
        trained = move(disassemble(student), resolve_device(session.compute))
        return self._loss(trained, self._teacher.model) | figures

    def _loss(self, model: PreTrainedModel, whole: PreTrainedModel) -> dict[str, Any]:
        from distill.evaluation.quality import measure_quality

        quality = measure_quality(model, whole, self._batches)
        return {"kl": quality.kl_to_teacher, "perplexity": quality.perplexity}

    @cached_property
    def _whole(self) -> PreTrainedModel:
        """The uncut model, while cuts are measured against it."""
        from distill.models.load import load_model, move
        from distill.stages.train import check_packing
        from distill.training.trainer import resolve_device

        device = resolve_device(self.context.session.compute)
        location = self.context.session.artifact(self.reference).location
        model = load_model(location, dtype="float32" if device == "cpu" else "auto")
        return move(check_packing(self.context, model), device)

    @cached_property
    def _teacher(self) -> LiveTeacher:
        """The uncut model as the teacher of every training."""
        from distill.stages.train import load_frozen
        from distill.training.live_teacher import LiveTeacher
        from distill.training.trainer import resolve_teacher

        device, _ = resolve_teacher(self.context.session.compute)
        teacher = LiveTeacher(load_frozen(self.context, self.reference), device)
        teacher.move(device)  # a search that goes on may measure before it trains
        return teacher

    @cached_property
    def _batches(self) -> list[Any]:
        corpus = self.context.session.corpus()
        num_sequences = min(self.spec.num_sequences, corpus.calibration_sequences)
        return list(corpus.calibration_loader(num_sequences, self._batch_size))
