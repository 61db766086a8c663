"""Structured pruning: criteria score, a plan decides, surgery cuts. A new criterion is a file and a name here."""

from distill.core.spec import Family
from distill.pruning.activation import Activation
from distill.pruning.block_influence import BlockInfluence
from distill.pruning.fluctuation import Fluctuation
from distill.pruning.leave_one_out import LeaveOneOut
from distill.pruning.magnitude import Magnitude
from distill.pruning.random import Random
from distill.pruning.taylor import Taylor
from distill.pruning.wanda import Wanda

CRITERIA = Family("criterion", Activation, Fluctuation, Wanda, Taylor, Magnitude, Random, BlockInfluence, LeaveOneOut)

__all__ = [
    "CRITERIA",
    "Activation",
    "BlockInfluence",
    "Fluctuation",
    "LeaveOneOut",
    "Magnitude",
    "Random",
    "Taylor",
    "Wanda",
]
