"""OLMo 2: attention and MLP read the residual stream as it is; norms stand behind them, and on q and k.

The norms on q and k run over the channels of all heads together. With fewer heads they run over those that stay, so
that a head's queries keep their size; the root mean square over all heads is lost with the heads that go.
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
