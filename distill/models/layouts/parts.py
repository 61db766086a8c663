"""Building blocks of layouts: the parameters of linear layers, norms, attention, MLPs and Llama-like decoders."""

from __future__ import annotations

from typing import Any, Literal

from distill.pruning.layout import Dimension, Layout, Parameter

HIDDEN, NEURONS, HEADS, GROUPS = "hidden_channels", "mlp_neurons", "attention_heads", "kv_groups"
SIZE_KEYS = {
    HIDDEN: "hidden_size",
    NEURONS: "intermediate_size",
    HEADS: "num_attention_heads",
    GROUPS: "num_key_value_heads",
    "layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
}
LAYER = "model.layers.{layer}"
GATE_AND_UP = (NEURONS, NEURONS)


def linear(
    path: str, rows: Dimension, columns: Dimension, *, bias: bool | str = True, rescaled: bool = False
) -> list[Parameter]:
    """Weight [rows, columns] and bias [rows] of a linear layer.

    Args:
        path: of the module.
        rows: axis of the outputs.
        columns: axis of the inputs.
        bias: False: none; True: always; or the config key that decides.
        rescaled: True if a norm after the layer reads the epsilon that hidden pruning rescales, so that the layer's
            output must be rescaled with it.
    """
    scaling: Literal["weight", "no"] = "weight" if rescaled else "no"
    weight = Parameter(f"{path}.weight", (rows, columns), rescaled=scaling)
    if bias is False:
        return [weight]
    return [weight, Parameter(f"{path}.bias", (rows,), bias if isinstance(bias, str) else None, rescaled=scaling)]


def rms_norm(path: str, *, one_plus: bool = False) -> Parameter:
    """The weight of an RMSNorm over the hidden channels; ``one_plus`` if the module adds one to the weight."""
    return Parameter(f"{path}.weight", (HIDDEN,), rescaled="one_plus_weight" if one_plus else "weight")


def layer_norm(path: str) -> list[Parameter]:
    """Weight and bias of a LayerNorm over the hidden channels."""
    return [Parameter(f"{path}.weight", (HIDDEN,), rescaled="weight"), Parameter(f"{path}.bias", (HIDDEN,))]


def attention(
    *, qkv_bias: bool | str = False, out_bias: bool | str = False, norms: Literal["none", "head", "width"] = "none"
) -> list[Parameter]:
    """The parameters of q, k, v and o under Llama's names, and of norms on q and k.

    Args:
        qkv_bias: whether q, k and v have biases, or the config key that decides.
        out_bias: the same for o.
        norms: none, over the channels of each head ("head"), or over the channels of all heads ("width"). Both kinds
            read the same epsilon as the other norms.
    """
    path, normed = f"{LAYER}.self_attn", norms != "none"
    rows = [
        *linear(f"{path}.q_proj", HEADS, HIDDEN, bias=qkv_bias, rescaled=normed),
        *linear(f"{path}.k_proj", GROUPS, HIDDEN, bias=qkv_bias, rescaled=normed),
        *linear(f"{path}.v_proj", GROUPS, HIDDEN, bias=qkv_bias),
        *linear(f"{path}.o_proj", HIDDEN, HEADS, bias=out_bias),
    ]
    if normed:
        q, k = ("head_dim", "head_dim") if norms == "head" else (HEADS, GROUPS)
        rows += [Parameter(f"{path}.q_norm.weight", (q,)), Parameter(f"{path}.k_norm.weight", (k,))]
    return rows


def gated_mlp(*, bias: bool | str = False) -> list[Parameter]:
    """The parameters of gate, up and down under Llama's names."""
    path = f"{LAYER}.mlp"
    return [
        *linear(f"{path}.gate_proj", NEURONS, HIDDEN, bias=bias),
        *linear(f"{path}.up_proj", NEURONS, HIDDEN, bias=bias),
        *linear(f"{path}.down_proj", HIDDEN, NEURONS, bias=bias),
    ]


def expert_mlp() -> list[Parameter]:
    """The parameters of a router and its experts; transformers stacks all experts of a layer in two tensors."""
    path = f"{LAYER}.mlp"
    return [
        Parameter(f"{path}.gate.weight", ("experts", HIDDEN)),
        Parameter(f"{path}.experts.gate_up_proj", ("experts", GATE_AND_UP, HIDDEN)),
        Parameter(f"{path}.experts.down_proj", ("experts", HIDDEN, NEURONS)),
    ]


def ends() -> list[Parameter]:
    """The parameters of the embeddings, the last norm and the head under Llama's names."""
    return [
        Parameter("model.embed_tokens.weight", ("vocabulary", HIDDEN)),
        rms_norm("model.norm"),
        Parameter("lm_head.weight", ("vocabulary", HIDDEN), unless="tie_word_embeddings"),
    ]


def decoder(model_type: str, layer: list[Parameter], *, of: list[Parameter] | None = None, **fields: Any) -> Layout:
    """The layout of a decoder whose modules have Llama's names.

    Args:
        model_type: of the config.
        layer: the parameters of a layer, with ``{layer}`` in their paths.
        of: the parameters outside the layers; default: :func:`ends`.
        fields: fields of :class:`Layout` that differ from Llama's.
    """
    start: dict[str, Any] = {
        "size_keys": SIZE_KEYS,
        "body": "model",
        "block": LAYER,
        "reads": (f"{LAYER}.self_attn", f"{LAYER}.mlp"),
        "attention_out": f"{LAYER}.self_attn.o_proj",
        "mlp_down": f"{LAYER}.mlp.down_proj",
        "projections": {part: f"{LAYER}.self_attn.{part[0]}_proj" for part in ("queries", "keys", "values")},
        "per_layer_keys": ("layer_types",),
    }
    return Layout(model_type=model_type, parameters=(*(of or ends()), *layer), **{**start, **fields})


def pre_norms() -> list[Parameter]:
    """The weights of a layer's two norms, before the attention and before the MLP."""
    return [rms_norm(f"{LAYER}.input_layernorm"), rms_norm(f"{LAYER}.post_attention_layernorm")]
