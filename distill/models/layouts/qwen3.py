"""Qwen3: Llama with norms on q and k over the channels of each head, with the same epsilon as the other norms."""

from distill.models.layouts.parts import attention, decoder, gated_mlp, pre_norms

LAYOUT = decoder(
    "qwen3",
    [
        *pre_norms(),
        *attention(qkv_bias="attention_bias", out_bias="attention_bias", norms="head"),
        *gated_mlp(),
    ],
)
