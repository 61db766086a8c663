"""Losses between a student's and a teacher's distributions; add a file and a name to this list to add one."""

from distill.core.spec import Family
from distill.losses.base import LossSpec, LossTerm
from distill.losses.cross_entropy import CrossEntropy, cross_entropy
from distill.losses.forward_kl import ForwardKL, forward_kl
from distill.losses.reverse_kl import ReverseKL, reverse_kl

LOSSES = Family("loss", ForwardKL, ReverseKL, CrossEntropy)

__all__ = [
    "LOSSES",
    "CrossEntropy",
    "ForwardKL",
    "LossSpec",
    "LossTerm",
    "ReverseKL",
    "cross_entropy",
    "forward_kl",
    "reverse_kl",
]
