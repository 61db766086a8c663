"""Special tokens and rendered chats in plain text: read as text, counted, and named with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.data.corpus import Corpus
from distill.data.encoder import TextEncoder
from distill.data.spec import DataSpec
from distill.data.tokenizer import END_OF_TEXT
from distill.data.written_out import RENDERED, SPECIAL, WrittenOut

CHATS = {
    "ChatML": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>",
    "Gemma": "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi<end_of_turn>",
    "Llama 2": "<s>[INST] <<SYS>>be kind<</SYS>> Hello [/INST] Hi </s>",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>",
    "Phi": "<|user|>\nHello<|end|>\n<|assistant|>\nHi<|end|>",
    "Alpaca": "Below is a task.\n\n### Instruction:\nSay hello.\n\n### Response:\nHello",
    "Vicuna": "USER: Hello\nASSISTANT: Hi",
}
PLAIN = {
    "code": "def f(x: list[int]) -> dict[str, Any]: return {'a': x[0]} if x < 3 else None  # [TODO] <none>",
    "html": "<html><body class='a'><s>old</s> <b>new</b></body></html>",
    "a play": "Human: who goes there?\nGhost: nobody.",
    "instructions": "### Instruction:\nno response follows",
    "prose": "a < b and c > d; see [1] and [INTRO].",
}


@pytest.mark.parametrize("name", CHATS)
def test_rendered_chats_are_found(name: str) -> None:
    assert WrittenOut.among([]).noted(CHATS[name]) == {RENDERED: 1}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_text_is_not_taken_for_one(name: str) -> None:
    assert WrittenOut.among(["<|im_end|>", "<pad>"]).noted(PLAIN[name]) == {}


def test_special_tokens_of_any_form_are_found() -> None:
    found = WrittenOut.among(["<s>", "[CLS]", "<|endoftext|>", "<<SYS>>", "\uff5cend\uff5c", "x"])
    for text in ("an <s> in it", "[CLS] first", "a<|endoftext|>b", "say <<SYS>>", "the \uff5cend\uff5c"):
        assert found.noted(text) == {SPECIAL: 1}
    assert found.noted("x < s > [CL S]") == {}
    backend = {"added_tokens": [{"content": "<s>", "special": True}, {"content": "<b>", "special": False}]}
    assert WrittenOut.written(backend) == WrittenOut.among(["<s>"])


def test_they_are_text_and_counted_at_the_start(tokenizer: Any, text_of: Any, tmp_path: Path) -> None:
    texts = [text_of(i) for i in range(40)] + [f"an {END_OF_TEXT} in {i}" for i in range(9)] + [CHATS["ChatML"]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    for text in (f"a{END_OF_TEXT}b", CHATS["ChatML"]):
        ids = TextEncoder(tokenizer).encode([text])[0].tolist()
        assert ids.count(tokenizer.eos_token_id) == 1 == ids[-1:].count(tokenizer.eos_token_id)
        assert tokenizer.decode(ids[:-1]) == text
    data = DataSpec.model_validate({"train": {"kind": "jsonl", "path": str(file)}, "sequence_length": 32})
    corpus = Corpus.open(data, tokenizer, tmp_path / "data", 0, 400)
    train, validation = corpus.train.tokens.tally, corpus.validation.tokens.tally  # type: ignore[union-attr]
    assert train.noted.get(SPECIAL, 0) + validation.noted.get(SPECIAL, 0) == 9
    assert train.noted.get(RENDERED, 0) + validation.noted.get(RENDERED, 0) == 1
    said = corpus.summary()
    assert "documents with special tokens of the tokenizer written out, read as plain text" in said
    assert f"use kind: chat (first {file.as_posix()}:50)" in said
    again = Corpus.open(data, tokenizer, tmp_path / "data", 0, 400)  # from disk
    assert again.summary() == said
