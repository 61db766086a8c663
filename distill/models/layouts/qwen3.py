"""Qwen3: Llama with q and k normalised over each head's own channels, under the same epsilon as the other norms."""

from distill.models.layouts.parts import attention, decoder, gated_mlp, pre_norms

LAYOUT = decoder(
    "qwen3",
    [
        *pre_norms(),
        *attention(qkv_bias="attention_bias", out_bias="attention_bias", norms="head"),
        *gated_mlp(),
    ],
)
