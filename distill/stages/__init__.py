"""The stages of a run; one file each, and a name in this list."""

from distill.core.spec import Family
from distill.stages.base import StageSpec
from distill.stages.distill import Distill
from distill.stages.finetune import Finetune

STAGES = Family("stage", Finetune, Distill)

__all__ = ["STAGES", "StageSpec"]
