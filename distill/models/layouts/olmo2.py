"""OLMo 2: no norms before attention and MLP, but norms on their outputs, and on q and k.

The norms on q and k are over the channels of all heads. After pruning they are over the kept heads only: the size of
the queries stays about the same, but the exact root mean square over the original heads is lost.
"""

from distill.models.layouts.parts import LAYER, attention, decoder, gated_mlp, rms_norm

LAYOUT = decoder(
    "olmo2",
    [
        *attention(qkv_bias="attention_bias", out_bias="attention_bias", norms="width"),
        *gated_mlp(),
        rms_norm(f"{LAYER}.post_attention_layernorm"),
        rms_norm(f"{LAYER}.post_feedforward_layernorm"),
    ],
)
