"""The prune stage: a smaller architecture cut out of a model."""

from distill.stages.prune.spec import Prune

__all__ = ["Prune"]
