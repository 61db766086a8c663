"""Llama and its next of kin: pre-norm decoders with RMSNorm, rotary positions, grouped-query attention and a gated MLP.

Mistral is the same without biases. Qwen2 always has biases on q, k and v. Qwen3 normalises q and k over each head's
own channels, with the same epsilon key as the other norms. SmolLM2 and the Llama 3 family are ``llama``.
"""

from __future__ import annotations

from distill.pruning.layout import Layout, Parameter

SIZE_KEYS = {
    "hidden_channels": "hidden_size",
    "mlp_neurons": "intermediate_size",
    "attention_heads": "num_attention_heads",
    "kv_groups": "num_key_value_heads",
    "layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
}
LAYER = "model.layers.{layer}"


def _linear(path: str, rows: str, columns: str, bias: bool | str, follows_norm_eps: bool = False) -> list[Parameter]:
    """Weight and bias of a linear layer; ``bias`` is never, always, or the config key that decides."""
    weight = Parameter(f"{LAYER}.{path}.weight", (rows, columns), follows_norm_eps=follows_norm_eps)
    if bias is False:
        return [weight]
    only_if = bias if isinstance(bias, str) else None
    return [weight, Parameter(f"{LAYER}.{path}.bias", (rows,), only_if, follows_norm_eps=follows_norm_eps)]


def _norm(path: str) -> Parameter:
    return Parameter(path, ("hidden_channels",), follows_norm_eps=True)


def _layout(
    model_type: str,
    *,
    qkv_bias: bool | str,
    out_bias: bool | str,
    mlp_bias: bool | str,
    head_norms: bool = False,
    hidden_divisible_by_heads: bool = False,
) -> Layout:
    hidden, heads, groups, neurons = "hidden_channels", "attention_heads", "kv_groups", "mlp_neurons"
    head_norm_rows = [Parameter(f"{LAYER}.self_attn.{name}_norm.weight", ("head_dim",)) for name in "qk"]
    return Layout(
        model_type=model_type,
        parameters=(
            Parameter("model.embed_tokens.weight", ("vocabulary", hidden)),
            # A norm over a head shares the epsilon that hidden pruning rescales: its input must grow along.
            *_linear("self_attn.q_proj", heads, hidden, qkv_bias, follows_norm_eps=head_norms),
            *_linear("self_attn.k_proj", groups, hidden, qkv_bias, follows_norm_eps=head_norms),
            *_linear("self_attn.v_proj", groups, hidden, qkv_bias),
            *_linear("self_attn.o_proj", hidden, heads, out_bias),
            *(head_norm_rows if head_norms else ()),
            *_linear("mlp.gate_proj", neurons, hidden, mlp_bias),
            *_linear("mlp.up_proj", neurons, hidden, mlp_bias),
            *_linear("mlp.down_proj", hidden, neurons, mlp_bias),
            _norm(f"{LAYER}.input_layernorm.weight"),
            _norm(f"{LAYER}.post_attention_layernorm.weight"),
            _norm("model.norm.weight"),
            Parameter("lm_head.weight", ("vocabulary", hidden), unless="tie_word_embeddings"),
        ),
        size_keys=SIZE_KEYS,
        body="model",
        block=LAYER,
        mlp_down=f"{LAYER}.mlp.down_proj",
        attention_out=f"{LAYER}.self_attn.o_proj",
        norms=(f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"),
        norm_eps_key="rms_norm_eps",
        per_layer_keys=("layer_types",),
        hidden_divisible_by_heads=hidden_divisible_by_heads,
        projections={part: f"{LAYER}.self_attn.{part[0]}_proj" for part in ("queries", "keys", "values")},
    )


LLAMA = _layout(
    "llama",
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mlp_bias="mlp_bias",
    hidden_divisible_by_heads=True,
)
MISTRAL = _layout("mistral", qkv_bias=False, out_bias=False, mlp_bias=False)
QWEN2 = _layout("qwen2", qkv_bias=True, out_bias=False, mlp_bias=False)
QWEN3 = _layout("qwen3", qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias=False, head_norms=True)
