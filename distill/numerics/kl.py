"""Kullback-Leibler divergence between two predictions of the next token. No other file computes it.

    KL(p || q) = sum_v p_v (log p_v - log q_v)        nats per token; v runs over the vocabulary

Losses, evaluation, exporters, pruning and quantization all need this sum. They differ in their inputs (logits or
log-probabilities, with or without probabilities) and in the memory that may be overwritten; the arguments cover all
cases. It is in a package below ``losses`` because pruning and quantization, which must not import losses, need it too.

There are three functions:

    kl                   from log-probabilities; differentiable
    kl_of_logits         from logits, for measurements: without a graph; logits may be minus infinity
    kl_and_gradient_     from logits, for training: computes the value, and overwrites the logits with the gradient
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor, p: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """KL(p || q) per token, in nats: [..., vocabulary] -> [...].

    Args:
        log_p: log-probabilities, finite, [..., vocabulary].
        log_q: log-probabilities, finite, [..., vocabulary].
        p: ``log_p.exp()`` if it is already known.
        out: buffer of the shape of ``log_p``, which is overwritten (there is no graph then); None to allocate one.
    """
    return kl_summands(log_p, log_q, p, out=out).sum(-1)


def kl_summands(log_p: Tensor, log_q: Tensor, p: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """The summands ``p * (log_p - log_q)`` of :func:`kl`, [..., vocabulary]; it has the same arguments."""
    import torch

    if p is None:
        p = log_p.exp()
    if out is None:
        return p * (log_p - log_q)
    return torch.sub(log_p, log_q, out=out).mul_(p)


def kl_of_logits(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) per token, in nats: [tokens, vocabulary] -> [tokens]. Call it under ``no_grad``.

    A token whose logit in p is minus infinity contributes nothing, whatever its probability in q.

    Args:
        p_logits: logits of p, [tokens, vocabulary], in the dtype in which to compute: float32, or float64 if the KL is
            as small as the rounding errors of float32.
        q_logits: logits of q over the same tokens, [tokens, vocabulary].
    """
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)  # [tokens, vocabulary]
    p, ruled_out = log_p.exp(), log_p == float("-inf")
    # 0 * (-inf - log q) is NaN, but its limit is 0
    return kl(log_p.masked_fill_(ruled_out, 0.0), log_q.masked_fill_(ruled_out, 0.0), p, out=log_p)


def kl_and_gradient_(p_logits: Tensor, q_logits: Tensor, scratch: Tensor) -> Tensor:
    """KL(p || q) per token, in nats: [tokens, vocabulary] -> [tokens]; ``q_logits`` is overwritten by the gradient.

    With the unnormalised P = exp(p_logits - max) and Q = exp(q_logits - max),

        KL(p || q)     = sum_v P_v (log P_v - log Q_v) / sum P - log(sum P / sum Q)
        d KL / d logit = Q / sum Q - P / sum P

    so no log-probabilities and no second copy of the probabilities are written. The cost of the default loss, without
    its matrix products, is memory traffic: this function makes 12 passes over 3 tensors. :func:`kl` of two softmaxes
    and the difference of the probabilities would make 17 passes over 5 tensors.

    Args:
        p_logits: logits of p, finite, fp32, [tokens, vocabulary]. They are overwritten by P.
        q_logits: logits of q, finite, fp32, [tokens, vocabulary]. They are overwritten by the gradient.
        scratch: uninitialised buffer of the same shape and dtype. It is overwritten.
    """
    import torch

    q_logits.sub_(q_logits.amax(-1, keepdim=True))
    p_logits.sub_(p_logits.amax(-1, keepdim=True))
    log_ratio = torch.sub(p_logits, q_logits, out=scratch)  # log P - log Q, [tokens, vocabulary]
    q_sum = q_logits.exp_().sum(-1, keepdim=True)  # [tokens, 1]; q_logits is Q from here on
    p_sum = p_logits.exp_().sum(-1, keepdim=True)  # [tokens, 1]; p_logits is P from here on
    value = log_ratio.mul_(p_logits).sum(-1, keepdim=True) / p_sum - (p_sum / q_sum).log()
    # multiplied by the inverse, because a division costs twice as much
    q_logits.mul_(1 / q_sum).addcmul_(p_logits, -1 / p_sum)
    return value.squeeze(-1)
