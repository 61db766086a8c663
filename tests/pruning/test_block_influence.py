"""Block influence against the residual stream put together by hand, token by token."""

import copy

import torch

from distill.pruning.block_influence import BlockInfluence


@torch.no_grad()
def test_block_influence_equals_the_naive_computation(model, layout, batches):
    sums, count = [0.0] * 3, 0
    for batch in batches:
        stream = model.model.embed_tokens(batch["input_ids"])
        rotary = model.model.rotary_emb(stream, torch.arange(9)[None])
        causal = torch.full((1, 1, 9, 9), -torch.inf).triu(1)
        states = [stream]
        for layer in model.model.layers:
            normed = layer.input_layernorm(stream)
            stream = stream + layer.self_attn(normed, position_embeddings=rotary, attention_mask=causal)[0]
            stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
            states.append(stream)
        for b, t in batch["mask"].nonzero().tolist():
            count += 1
            for i in range(3):
                x, y = states[i][b, t], states[i + 1][b, t]
                dot = sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True))
                size = sum(p * p for p in x.tolist()) ** 0.5 * sum(q * q for q in y.tolist()) ** 0.5
                sums[i] += 1 - dot / size
    expected = torch.tensor(sums) / count
    torch.testing.assert_close(BlockInfluence().score(model, layout, batches).layers, expected, rtol=1e-4, atol=1e-6)


def test_a_layer_that_does_nothing_scores_zero(model, layout, batches):
    idle = copy.deepcopy(model)
    with torch.no_grad():
        idle.model.layers[1].self_attn.o_proj.weight.zero_()
        idle.model.layers[1].mlp.down_proj.weight.zero_()
    scores = BlockInfluence().score(idle, layout, batches).layers
    assert scores is not None
    assert abs(scores[1].item()) < 1e-6
    assert scores[0] > 1e-3
    assert scores[2] > 1e-3
