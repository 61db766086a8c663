"""The stages of a run: one file or folder each, and one line here."""

from distill.core.spec import Family
from distill.stages.base import StageSpec

# they are listed in this order
# isort: off
from distill.stages.finetune import Finetune
from distill.stages.prune import Prune
from distill.stages.sparsify import Sparsify
from distill.stages.cache_teacher import CacheTeacher
from distill.stages.synthesize import Synthesize
from distill.stages.synthesize.makers import MAKERS as MAKERS
from distill.stages.distill import Distill
from distill.stages.quantize import Quantize
from distill.stages.evaluate import Evaluate
from distill.stages.exam import Exam
from distill.stages.export import Export
from distill.stages.report import Report

STAGES = Family.among("stage", globals(), StageSpec)
