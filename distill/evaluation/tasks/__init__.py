"""Tasks on which models are scored, such as multiple choice. Each task is one file, and is registered here."""

from distill.core.spec import Family
from distill.evaluation.tasks.base import TaskSpec

# the order in which `distill list` shows them
# isort: off
from distill.evaluation.tasks.multiple_choice import MultipleChoice
from distill.evaluation.tasks.generate import Generate
from distill.evaluation.tasks.cloze import Cloze
from distill.evaluation.tasks.lm_eval import LmEval

TASKS = Family("task", MultipleChoice, Generate, Cloze, LmEval)
