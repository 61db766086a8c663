"""A tiny random model of every architecture, and the same model with what a plan removes held at zero.

The second is written down from each architecture's own module names, without the layouts that it is to judge.
"""

import copy
from dataclasses import dataclass

import torch
import transformers
from torch import nn

HIDDEN, NEURONS, HEADS, GROUPS, LAYERS, VOCABULARY = 64, 48, 4, 2, 4, 101
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# A large epsilon, so that a norm that is rescaled wrongly shows.
LLAMA_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "initializer_range": 0.2,
    **TOKENS,
}
NO_GROUPS = {k: v for k, v in LLAMA_SHAPE.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
BERT_SHAPE = {**NO_GROUPS, "layer_norm_eps": 1e-2}
GPT2_SHAPE = {
    "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64,
    "layer_norm_epsilon": 1e-2, "initializer_range": 0.2, **TOKENS,
}  # fmt: skip
DISTILBERT_SHAPE = {
    "vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": NEURONS, "n_layers": LAYERS, "n_heads": HEADS,
    "max_position_embeddings": 64, "initializer_range": 0.2, **TOKENS,
}  # fmt: skip
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "llama_4_scaling_beta": 0.1,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": LAYER_TYPES}
EXPERTS = {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Parts:
    """Module names inside an architecture, as its source has them; ``out`` and ``down`` inside a layer."""

    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    layers: str = "model.layers"
    out: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    head: tuple[str, ...] = ()


LLAMA = Parts()
GPT2 = Parts(("transformer.wte", "transformer.wpe"), "transformer.h", "attn.c_proj", "mlp.c_proj")
NEOX = Parts(("gpt_neox.embed_in",), "gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h")


def bert_parts(prefix, head):
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    embeddings = tuple(f"{prefix}.embeddings.{name}" for name in names)
    return Parts(embeddings, f"{prefix}.encoder.layer", "attention.output.dense", "output.dense", (head,))


DISTILBERT = Parts(
    tuple(f"distilbert.embeddings.{name}_embeddings" for name in ("word", "position")),
    "distilbert.transformer.layer",
    "attention.out_lin",
    "ffn.lin2",
    ("vocab_transform",),
)
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MODELS = {
    "llama": ("Llama", LLAMA, {**LLAMA_SHAPE, "rope_parameters": LLAMA3_ROPE, "head_dim": 8}),
    "llama_tied": ("Llama", LLAMA, {**LLAMA_SHAPE, **TIED}),
    "llama_biases_no_groups": (
        "Llama",
        LLAMA,
        {**LLAMA_SHAPE, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": HEADS},
    ),
    "mistral": ("Mistral", LLAMA, {**LLAMA_SHAPE, "head_dim": 8, "sliding_window": 5}),
    "ministral3": ("Ministral3", LLAMA, {**LLAMA_SHAPE, "head_dim": 8, "rope_parameters": YARN}),
    "smollm3": ("SmolLM3", LLAMA, {**LLAMA_SHAPE, **TIED, "no_rope_layer_interval": 2}),
    "granite": ("Granite", LLAMA, {**LLAMA_SHAPE, **TIED, **GRANITE}),
    "qwen2": ("Qwen2", LLAMA, {**LLAMA_SHAPE, **SLIDING}),
    "qwen2_tied": ("Qwen2", LLAMA, {**LLAMA_SHAPE, **TIED}),
    "qwen3": ("Qwen3", LLAMA, {**LLAMA_SHAPE, "head_dim": 8, **SLIDING}),
    "qwen3_tied_biases": ("Qwen3", LLAMA, {**LLAMA_SHAPE, **TIED, "attention_bias": True}),
    "gemma2": ("Gemma2", LLAMA, {**LLAMA_SHAPE, **GEMMA}),
    "gemma2_untied": ("Gemma2", LLAMA, {**LLAMA_SHAPE, **GEMMA, **UNTIED, "attention_bias": True}),
    "gemma3": ("Gemma3", LLAMA, {**LLAMA_SHAPE, **GEMMA}),
    "phi3": ("Phi3", LLAMA, {**LLAMA_SHAPE, "head_dim": 8}),
    "phi4_mini": ("Phi3", LLAMA, {**LLAMA_SHAPE, **TIED, "partial_rotary_factor": 0.75, "sliding_window": 5}),
    "olmo2": ("Olmo2", LLAMA, LLAMA_SHAPE),
    "olmo2_tied_biases": ("Olmo2", LLAMA, {**LLAMA_SHAPE, **TIED, "attention_bias": True}),
    "mixtral": ("Mixtral", LLAMA, {**LLAMA_SHAPE, **EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        LLAMA,
        {**LLAMA_SHAPE, **EXPERTS, "num_experts": 4, "moe_intermediate_size": NEURONS, "head_dim": 8},
    ),
    "gpt2": ("GPT2", GPT2, {**GPT2_SHAPE, "n_inner": NEURONS}),
    "gpt2_untied_derived": ("GPT2", GPT2, {**GPT2_SHAPE, **UNTIED}),
    "pythia": ("GPTNeoX", NEOX, BERT_SHAPE),
    "gpt_neox_tied_serial": ("GPTNeoX", NEOX, {**BERT_SHAPE, **TIED, "use_parallel_residual": False}),
    "bert": ("Bert", bert_parts("bert", "cls.predictions.transform.dense"), {**BERT_SHAPE, "pad_token_id": 0}),
    "roberta": ("Roberta", bert_parts("roberta", "lm_head.dense"), {**BERT_SHAPE, "pad_token_id": 1}),
    "distilbert": ("DistilBert", DISTILBERT, {**DISTILBERT_SHAPE, "pad_token_id": 0}),
    "distilbert_untied": ("DistilBert", DISTILBERT, {**DISTILBERT_SHAPE, **UNTIED}),
}


def make(name):
    """The model, in which no norm and no bias is what it is trivially right for."""
    kind, _, keys = MODELS[name]
    config = getattr(transformers, f"{'Gemma3Text' if kind == 'Gemma3' else kind}Config")(**keys)
    suffix = {"GPT2": "LMHeadModel"}.get(kind, "ForMaskedLM" if "Bert" in kind or kind == "Roberta" else "ForCausalLM")
    torch.manual_seed(0)
    made = getattr(transformers, kind + suffix)(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            assert parameter.isfinite().all(), name
        for module in made.modules():
            if "Router" in type(module).__name__:
                module.weight.normal_()  # one architecture begins with zeros
    return made


class NormOfSome(nn.Module):
    """A norm over channels of which only some are there: centred over those, divided by the mean square over all."""

    def __init__(self, norm, kept):
        super().__init__()
        self.norm, self.size = norm, norm.weight.numel()
        self.there = torch.zeros(self.size)
        self.there[list(kept)] = 1.0

    def forward(self, x):
        x = x * self.there
        centred = (x - x.sum(-1, keepdim=True) / self.there.sum()) * self.there
        size = (centred.square().sum(-1, keepdim=True) / self.size + self.norm.eps).sqrt()
        return (centred / size * self.norm.weight + self.norm.bias) * self.there


class RmsOfSome(nn.Module):
    """An RMSNorm over the entries of all heads, of which only some are there."""

    def __init__(self, norm, kept, eps):
        super().__init__()
        self.norm, self.eps = norm, eps
        self.there = torch.zeros(norm.weight.numel())
        self.there[kept] = 1.0

    def forward(self, x):
        x = x * self.there
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.there.sum() + self.eps) * self.norm.weight


def router_of_some(module, kept, config):
    """The router's forward with all but some experts out of its reach."""

    def forward(hidden_states):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = nn.functional.linear(flat, module.weight)
        gone = [e for e in range(len(module.weight)) if e not in kept]
        logits[:, gone] = -torch.inf
        values, indices = torch.topk(logits.softmax(-1), config.num_experts_per_tok, -1)
        if getattr(config, "norm_topk_prob", True):
            values = values / values.sum(-1, keepdim=True)
        return logits, values, indices

    return forward


def gone(kept, total):
    return [i for i in range(total) if i not in kept]


def silence_outputs(module, rows):
    """Let a linear layer, of whatever build, give zero on some outputs."""
    weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
    weight[rows] = 0
    if module.bias is not None:
        module.bias[rows] = 0


def silence_inputs(module, columns):
    weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
    weight[:, columns] = 0


def head_entries(heads, head_dim):
    return [head * head_dim + i for head in heads for i in range(head_dim)]


def pool_groups(attention, made):
    """Keys and values of each run of neighbouring groups become their mean, in place."""
    before, after, head_dim = made.before["kv_groups"], made.after["kv_groups"], made.before["head_dim"]
    if hasattr(attention, "qkv_proj"):
        queries, size = made.before["attention_heads"] * head_dim, before * head_dim
        rows = [attention.qkv_proj.weight[queries : queries + size], attention.qkv_proj.weight[queries + size :]]
    else:
        modules = [attention.k_proj, attention.v_proj]
        if len(getattr(getattr(attention, "k_norm", None), "weight", ())) == before * head_dim:
            modules.append(attention.k_norm)
        rows = [p for module in modules for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    for tensor in rows:
        runs = tensor.unflatten(0, (after, before // after, head_dim))
        runs.copy_(runs.mean(1, keepdim=True).expand_as(runs))


@torch.no_grad()
def masked(name, model, made):
    """The unpruned model with everything that the plan removes silenced."""
    silent, parts = copy.deepcopy(model), MODELS[name][1]
    head_dim, layers = made.before["head_dim"], silent.get_submodule(parts.layers)
    hidden = gone(made.hidden_channels, HIDDEN)
    for path in parts.embeddings:
        silent.get_submodule(path).weight[:, hidden] = 0
    for path in parts.head:
        silence_outputs(silent.get_submodule(path), hidden)
    for new, old in enumerate(made.layers):
        layer = layers[old]
        silent_heads = {made.attention_heads[new][i] for i in made.silent_heads(new)}
        sounding = [head for head in made.attention_heads[new] if head not in silent_heads]
        heads = gone(sounding, made.before["attention_heads"])
        silence_inputs(layer.get_submodule(parts.out), head_entries(heads, head_dim))
        silence_outputs(layer.get_submodule(parts.out), hidden)
        if made.experts is None:
            silence_inputs(layer.get_submodule(parts.down), gone(made.mlp_neurons[new], made.before["mlp_neurons"]))
            silence_outputs(layer.get_submodule(parts.down), hidden)
        else:
            down = layer.mlp.experts.down_proj
            down[:, hidden] = 0
            for expert in made.experts[new]:
                neurons = [n - expert * NEURONS for n in made.mlp_neurons[new]]
                down[expert][:, gone(neurons, NEURONS)] = 0
            layer.mlp.gate.forward = router_of_some(layer.mlp.gate, made.experts[new], model.config)
        if made.group_choice == "pool":
            pool_groups(layer.self_attn, made)
        if "olmo2" in name:
            for letter, units in (("q", made.attention_heads), ("k", made.kv_groups)):
                norm = getattr(layer.self_attn, f"{letter}_norm")
                some = RmsOfSome(norm, head_entries(units[new], head_dim), model.config.rms_norm_eps)
                setattr(layer.self_attn, f"{letter}_norm", some)
    for old in gone(made.layers, len(layers)):
        layers[old].forward = lambda hidden_states, *args, **kwargs: hidden_states
    if hidden:
        for path, module in list(silent.named_modules()):
            if isinstance(module, nn.LayerNorm):
                silent.set_submodule(path, NormOfSome(module, made.hidden_channels))
    return silent
