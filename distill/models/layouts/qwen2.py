"""Qwen2 and Qwen2.5: Llama with biases on q, k and v; some layers may attend within a sliding window."""

from distill.models.layouts.parts import attention, decoder, gated_mlp, pre_norms

LAYOUT = decoder("qwen2", [*pre_norms(), *attention(qkv_bias=True), *gated_mlp()])
