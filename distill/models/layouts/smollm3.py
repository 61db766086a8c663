"""SmolLM3: Llama in which every fourth layer has no rotary positions; the config lists which layers have them."""

from distill.models.layouts.parts import attention, decoder, gated_mlp, pre_norms

LAYOUT = decoder(
    "smollm3",
    [*pre_norms(), *attention(qkv_bias="attention_bias", out_bias="attention_bias"), *gated_mlp(bias="mlp_bias")],
    per_layer_keys=("layer_types", "no_rope_layers"),
)
