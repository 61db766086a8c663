"""Qwen3 mixture of experts: Qwen3 with experts instead of the MLP, in every layer."""

from distill.models.layouts.parts import LAYER, NEURONS, SIZE_KEYS, attention, decoder, expert_mlp, pre_norms

LAYOUT = decoder(
    "qwen3_moe",
    [
        *pre_norms(),
        *attention(qkv_bias="attention_bias", out_bias="attention_bias", norms="head"),
        *expert_mlp(),
    ],
    size_keys={**SIZE_KEYS, NEURONS: "moe_intermediate_size", "experts": ("num_local_experts", "num_experts")},
    mlp_down=None,
    experts=f"{LAYER}.mlp.experts",
    expects={"decoder_sparse_step": 1, "mlp_only_layers": []},
)
