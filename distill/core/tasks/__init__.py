"""What a model is trained and measured on. Each task is one file."""

from distill.core.spec import Family
from distill.core.tasks.base import Head, ModelTask

# the order in which `distill list` shows them
# isort: off
from distill.core.tasks.causal_lm import CausalLM
from distill.core.tasks.masked_lm import MaskedLM, MaskSpec
from distill.core.tasks.classification import Classification
from distill.core.tasks.regression import Regression
from distill.core.tasks.token_classification import TokenClassification
from distill.core.tasks.embedding import Embedding

MODEL_TASKS = Family("training task", CausalLM, MaskedLM, Classification, Regression, TokenClassification, Embedding)
"""What a recipe's ``task`` may be."""

__all__ = [
    "MODEL_TASKS", "CausalLM", "Classification", "Embedding", "Head", "MaskSpec", "MaskedLM", "ModelTask", "Regression",
    "TokenClassification",
]  # fmt: skip
