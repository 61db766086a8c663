"""The stages of a run; one file each, and a name in this list."""

from distill.core.spec import Family
from distill.stages.base import StageSpec
from distill.stages.cache_teacher import CacheTeacher
from distill.stages.distill import Distill
from distill.stages.evaluate import Evaluate
from distill.stages.export import Export
from distill.stages.finetune import Finetune
from distill.stages.prune import Prune
from distill.stages.quantize import Quantize
from distill.stages.report import Report
from distill.stages.sparsify import Sparsify

STAGES = Family("stage", Finetune, Prune, Sparsify, CacheTeacher, Distill, Quantize, Evaluate, Export, Report)

__all__ = ["STAGES", "StageSpec"]
