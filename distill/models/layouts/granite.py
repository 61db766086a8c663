"""Granite 3 and other dense Granite models: Llama with constant factors of embeddings, attention, residuals and logits.

The factors do not depend on sizes, so pruning leaves them as they are.
"""

from distill.models.layouts.parts import attention, decoder, gated_mlp, pre_norms

LAYOUT = decoder(
    "granite",
    [*pre_norms(), *attention(qkv_bias="attention_bias", out_bias="attention_bias"), *gated_mlp(bias="mlp_bias")],
)
