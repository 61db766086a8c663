"""Llama 1 to 3, SmolLM and SmolLM2: pre-norm decoders with RMSNorm, rotary positions, grouped queries, a gated MLP."""

from distill.models.layouts.parts import attention, decoder, gated_mlp, pre_norms

LAYOUT = decoder(
    "llama",
    [*pre_norms(), *attention(qkv_bias="attention_bias", out_bias="attention_bias"), *gated_mlp(bias="mlp_bias")],
    hidden_rule="multiple_of_heads",
)
