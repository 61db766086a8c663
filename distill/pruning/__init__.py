"""Structured pruning: criteria score, a plan decides, surgery cuts. A new criterion is a file and a name here."""

from distill.core.spec import Family
from distill.pruning.activation import Activation
from distill.pruning.block_influence import BlockInfluence
from distill.pruning.magnitude import Magnitude
from distill.pruning.random import Random

CRITERIA = Family("criterion", Activation, Magnitude, Random, BlockInfluence)

__all__ = ["CRITERIA", "Activation", "BlockInfluence", "Magnitude", "Random"]
