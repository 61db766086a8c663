"""Mistral and Mistral-NeMo: Llama without biases, with a head size of its own and, in the first, a sliding window."""

from distill.models.layouts.parts import attention, decoder, gated_mlp, pre_norms

LAYOUT = decoder("mistral", [*pre_norms(), *attention(), *gated_mlp()])
