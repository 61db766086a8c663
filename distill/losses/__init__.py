"""The losses that train a student on its teacher: on logits, or on hidden states. Each loss is one file."""

from distill.core.spec import Family
from distill.losses.base import AnyLossSpec, LossSpec
from distill.losses.layer_losses import StateLossSpec
from distill.losses.schedule import Schedule
from distill.numerics.term import LossTerm

# the order in which `distill list` shows them
# isort: off
from distill.losses.forward_kl import ForwardKL, forward_kl
from distill.losses.reverse_kl import ReverseKL, reverse_kl
from distill.losses.jensen_shannon import JensenShannon, jensen_shannon
from distill.losses.skewed_forward_kl import SkewedForwardKL, skewed_forward_kl
from distill.losses.skewed_reverse_kl import SkewedReverseKL, skewed_reverse_kl
from distill.losses.adaptive_kl import AdaptiveKL, adaptive_kl
from distill.losses.total_variation import TotalVariation, total_variation
from distill.losses.standardized_kl import StandardizedKL, standardized_kl
from distill.losses.decoupled_kd import DecoupledKD, decoupled_kd
from distill.losses.cross_entropy import CrossEntropy, cross_entropy
from distill.losses.embedding_cosine import EmbeddingCosine, embedding_cosine
from distill.losses.score_mse import ScoreMSE, score_mse
from distill.losses.label_mse import LabelMSE, label_mse
from distill.losses.hidden_mse import HiddenMSE, hidden_mse
from distill.losses.hidden_cosine import HiddenCosine, hidden_cosine
from distill.losses.attention_relation import AttentionRelation, attention_relation
from distill.losses.attention_score import AttentionScore, attention_score

LOSSES = Family.among("loss", globals(), LossSpec, StateLossSpec)
