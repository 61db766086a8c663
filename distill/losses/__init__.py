"""Losses between a student's and a teacher's distributions; add a file and a name to this list to add one."""

from distill.core.spec import Family
from distill.losses.adaptive_kl import AdaptiveKL, adaptive_kl
from distill.losses.base import LossSpec, LossTerm
from distill.losses.cross_entropy import CrossEntropy, cross_entropy
from distill.losses.decoupled_kd import DecoupledKD, decoupled_kd
from distill.losses.forward_kl import ForwardKL, forward_kl
from distill.losses.jensen_shannon import JensenShannon, jensen_shannon
from distill.losses.reverse_kl import ReverseKL, reverse_kl
from distill.losses.schedule import Schedule
from distill.losses.skewed_forward_kl import SkewedForwardKL, skewed_forward_kl
from distill.losses.skewed_reverse_kl import SkewedReverseKL, skewed_reverse_kl
from distill.losses.standardized_kl import StandardizedKL, standardized_kl
from distill.losses.total_variation import TotalVariation, total_variation

LOSSES = Family(
    "loss",
    ForwardKL,
    ReverseKL,
    JensenShannon,
    SkewedForwardKL,
    SkewedReverseKL,
    AdaptiveKL,
    TotalVariation,
    StandardizedKL,
    DecoupledKD,
    CrossEntropy,
)

__all__ = [
    "LOSSES",
    "AdaptiveKL",
    "CrossEntropy",
    "DecoupledKD",
    "ForwardKL",
    "JensenShannon",
    "LossSpec",
    "LossTerm",
    "ReverseKL",
    "Schedule",
    "SkewedForwardKL",
    "SkewedReverseKL",
    "StandardizedKL",
    "TotalVariation",
    "adaptive_kl",
    "cross_entropy",
    "decoupled_kd",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "standardized_kl",
    "total_variation",
]
