"""Losses of a student against its teacher, on predictions and inner states; add a file and a name here to add one."""

from distill.core.spec import Family
from distill.losses.adaptive_kl import AdaptiveKL, adaptive_kl
from distill.losses.attention_relation import AttentionRelation, attention_relation
from distill.losses.base import AnyLossSpec, LossSpec, LossTerm
from distill.losses.cross_entropy import CrossEntropy, cross_entropy
from distill.losses.decoupled_kd import DecoupledKD, decoupled_kd
from distill.losses.forward_kl import ForwardKL, forward_kl
from distill.losses.hidden_cosine import HiddenCosine, hidden_cosine
from distill.losses.hidden_mse import HiddenMSE, hidden_mse
from distill.losses.jensen_shannon import JensenShannon, jensen_shannon
from distill.losses.reverse_kl import ReverseKL, reverse_kl
from distill.losses.schedule import Schedule
from distill.losses.skewed_forward_kl import SkewedForwardKL, skewed_forward_kl
from distill.losses.skewed_reverse_kl import SkewedReverseKL, skewed_reverse_kl
from distill.losses.standardized_kl import StandardizedKL, standardized_kl
from distill.losses.states import StateLossSpec
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
    HiddenMSE,
    HiddenCosine,
    AttentionRelation,
)

__all__ = [
    "LOSSES",
    "AdaptiveKL",
    "AnyLossSpec",
    "AttentionRelation",
    "CrossEntropy",
    "DecoupledKD",
    "ForwardKL",
    "HiddenCosine",
    "HiddenMSE",
    "JensenShannon",
    "LossSpec",
    "LossTerm",
    "ReverseKL",
    "Schedule",
    "SkewedForwardKL",
    "SkewedReverseKL",
    "StandardizedKL",
    "StateLossSpec",
    "TotalVariation",
    "adaptive_kl",
    "attention_relation",
    "cross_entropy",
    "decoupled_kd",
    "forward_kl",
    "hidden_cosine",
    "hidden_mse",
    "jensen_shannon",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "standardized_kl",
    "total_variation",
]
