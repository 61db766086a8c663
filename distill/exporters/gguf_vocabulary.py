"""A tokenizer in GGUF: tokens, special token ids, and merges with the name of a pre-tokenizer pattern, or scores."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.exporters.gguf_sentencepiece import BYTE, adds_space, is_sentencepiece, scores_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

# A GGUF file has the name of a pattern that is built into llama.cpp. These are the patterns as in tokenizer.json.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    _TEKKEN: "tekken",
}
# token types of the format
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTES = 1, 2, 3, 4, 5, 6


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig) -> None:
    """Write the tokenizer, its special tokens and its chat template into the file's header.

    Raises:
        InputError: llama.cpp would cut text otherwise, or it has more tokens than the model has embeddings.
    """
    state = _state(tokenizer)
    tokens, types = _tokens(state, config.vocab_size)
    if is_sentencepiece(state):
        has_space, scores = _as_sentencepiece(state)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
        writer.add_token_types(types)
        writer.add_add_space_prefix(has_space)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(state))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(_merges(state))
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    begins, ends = _added(tokenizer)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that :func:`add_vocabulary` can write a tokenizer, without a model.

    Raises:
        InputError: see :func:`add_vocabulary`.
    """
    state = _state(tokenizer)
    if is_sentencepiece(state):
        _as_sentencepiece(state)
    else:
        pre_tokenizer_name(state)
        _merges(state)
    _tokens(state)
    _added(tokenizer)


def _state(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return state


def _as_sentencepiece(state: dict[str, Any]) -> tuple[bool, dict[str, float]]:
    """Whether a space is put in front of each text, and the scores of the tokens."""
    has_space, scores = adds_space(state), scores_of(state)
    if has_space is None:
        raise _refusal("llama.cpp does not support its normalizer or pre-tokenizer")
    if scores is None:
        raise _refusal("its merges cannot be expressed as one score per token")
    return has_space, scores


def _merges(state: dict[str, Any]) -> list[str]:
    """Older files write a merge as one string, newer ones as a pair."""
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    if not merges:
        raise _refusal("it has no merges, and llama.cpp loads no BPE without any")
    return merges


def pre_tokenizer_name(state: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which a ``tokenizer.json`` cuts text before its merges.

    Raises:
        InputError: it has none for it.
    """
    model = state["model"]
    if model["type"] != "BPE":
        raise _refusal(f"it is {model['type']}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise _refusal("its merges have a prefix, a suffix or dropout")
    # llama.cpp does not apply NFC, also for the published files of these models; most text is in NFC already
    if (state["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _refusal(f"it normalizes text ({state['normalizer']['type']})")
    steps = state["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise _refusal("it is not byte-level, or adds a space before the text")
    if steps[-1].get("use_regex", True):
        digits = [step for step in steps[:-1] if step.get("type") == "Digits" and step.get("individual_digits")]
        if len(digits) == len(steps) - 1 <= 1:
            return "smollm" if digits else "gpt-2"
    elif len(steps) == 2 and steps[0].get("type") == "Split" and not steps[0].get("invert"):
        name = PATTERNS.get(steps[0]["pattern"].get("Regex", ""))
        if name and steps[0]["behavior"] == "Isolated":
            return name
    raise _refusal("llama.cpp does not have its pre-tokenizer pattern")


def _tokens(state: dict[str, Any], num_rows: int | None = None) -> tuple[list[str], list[int]]:
    """The tokens in the order of their ids, and their types; extra rows of the embedding become unused tokens."""
    has_bytes, unknown = state["model"].get("byte_fallback"), state["model"].get("unk_token")
    tokens = {
        index: (token, BYTES if has_bytes and BYTE.fullmatch(token) else NORMAL)
        for token, index in state["model"]["vocab"].items()
    }
    for added in state["added_tokens"]:
        if added["single_word"] or added["lstrip"] or added["rstrip"]:
            raise _refusal(f"token {added['content']!r} has single_word, lstrip or rstrip set")
        kind = UNKNOWN if added["content"] == unknown else CONTROL if added["special"] else USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    num_rows = num_rows or max(tokens) + 1
    if max(tokens) >= num_rows:
        raise _refusal(f"it has a token with the id {max(tokens)}, but the model has only {num_rows} embeddings")
    listed = [tokens.get(index, (f"[unused {index}]", UNUSED)) for index in range(num_rows)]
    return [token for token, _ in listed], [kind for _, kind in listed]


def _added(tokenizer: PreTrainedTokenizerFast) -> tuple[bool, bool]:
    """Whether the tokenizer adds the begin-of-text token, and the end-of-text token."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for begin in ([], [tokenizer.bos_token_id]):
        for end in ([], [tokenizer.eos_token_id]):
            if whole == begin + plain + end:
                return bool(begin), bool(end)
    raise _refusal("it adds other tokens to a text than begin-of-text and end-of-text")


def _refusal(why: str) -> InputError:
    return InputError(
        f"tokenizer: cannot be written as GGUF: {why} (expected a byte-level BPE tokenizer like that of GPT-2, SmolLM, "
        "Llama 3, Qwen 2 or Mistral's Tekken, or one like that of Gemma or Llama 2)"
    )
