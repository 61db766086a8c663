"""Structured pruning: criteria score units, a plan chooses which stay, surgery cuts the model.

To add a criterion, write one file in this folder and import its class here.
"""

from distill.core.spec import Family
from distill.pruning.base import CriterionSpec

# `distill list` shows them in this order
# isort: off
from distill.pruning.activation import Activation
from distill.pruning.fluctuation import Fluctuation
from distill.pruning.wanda import Wanda
from distill.pruning.weight_range import WeightRange
from distill.pruning.taylor import Taylor
from distill.pruning.magnitude import Magnitude
from distill.pruning.random import Random
from distill.pruning.block_influence import BlockInfluence
from distill.pruning.leave_one_out import LeaveOneOut

CRITERIA = Family.among("criterion", globals(), CriterionSpec)
