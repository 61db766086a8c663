"""Gemma 3, text only (the 270M and 1B models, or the language model of a larger one): Gemma 2 with norms on q and k."""

from distill.models.layouts.gemma2 import ENDS, SANDWICH
from distill.models.layouts.parts import attention, decoder, gated_mlp

LAYOUT = decoder(
    "gemma3_text",
    [
        *SANDWICH,
        *attention(qkv_bias="attention_bias", out_bias="attention_bias", norms="head"),
        *gated_mlp(),
    ],
    of=ENDS,
    hidden_rule="multiple_of_heads",
)
