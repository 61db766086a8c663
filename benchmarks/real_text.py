"""Losses of real models on the rows that distill makes, compared with transformers reading each piece of text alone.

`python -m benchmarks.real_text MODEL ... --corpus BOOKS` takes folders of causal language models. For each packing and
row length, it measures the loss of the same tokens three times: in the rows as they are, in rows without the tokens
that the tokenizer adds before a text (as earlier versions made them), and with :func:`alone`, which does not use
distill.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import hardware, result
from distill.core.batch import model_inputs
from distill.data.base import Document
from distill.data.encoder import TextEncoder
from distill.data.packed_rows import PackedRows
from distill.data.packing import write_tokens
from distill.data.tokenizer import load_tokenizer
from distill.pretrained import model_from, tokenizer_from

PACKINGS = ("wrapped", "documents", "best_fit", "padded")
SHARES = (20, 1, 8, 3, 40)
"""Divisors of the longest document's length, so that some documents share a row and others are split."""
Losses = dict[int, float]
"""Index of a token in the text -> its loss in nats."""


@torch.no_grad()
def in_rows(model: Any, blocks: PackedRows, count: int) -> Losses:
    """Losses of what counts in the first rows, as training and evaluation see them."""
    found: Losses = {}
    for number in range(min(count, len(blocks))):
        batch = blocks[number]
        logits = model(**model_inputs(batch), use_cache=False).logits[batch["mask"]]
        nats = torch.nn.functional.cross_entropy(logits.float(), batch["targets"][batch["mask"]], reduction="none")
        found |= dict(zip(blocks.predicted(number).tolist(), nats.tolist(), strict=True))
    return found


def alone(model: Any, tokenizer: Any, texts: Sequence[str], length: int, *, wrapped: bool, wanted: set[int]) -> Losses:
    """Losses of the same tokens with transformers only, for one piece of text at a time, without distill.

    Args:
        model: model of transformers.
        tokenizer: tokenizer of transformers.
        texts: texts of the documents.
        length: largest number of tokens that the model reads at once.
        wrapped: whether the documents are concatenated, or read separately.
        wanted: indices of tokens; pieces without any of them are skipped.
    """
    documents = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    begin = tokenizer("")["input_ids"]
    found: Losses = {}
    for at, ids, skipped in _wrapped(documents, begin, length) if wrapped else _apart(documents, begin, length):
        if len(ids) > 1 and wanted & {*range(at, at + len(ids))}:
            nats = _nats(model, ids)
            # the first token after added begin tokens is not counted, because the text before it is missing
            found |= {at + i - skipped: nats[i - 1] for i in range(1, len(ids)) if i > skipped}
    starts = [sum(map(len, documents[:number])) for number in range(len(documents))]
    for start in starts:
        for i in range(len(begin)):
            found.pop(start + i, None)  # tokens that the tokenizer adds are not text
    return found


def _wrapped(documents: list[list[int]], begin: list[int], length: int) -> Iterator[tuple[int, list[int], int]]:
    """(index of the first token of the text, token ids to read, number of added begin tokens) for each piece."""
    flat = [token for document in documents for token in document]
    within = [place for document in documents for place in range(len(document))]
    for at in range(0, len(flat), length - len(begin)):
        lacking = begin[: within[at]]
        yield at, lacking + flat[at : at + length - len(begin)], len(lacking)


def _apart(documents: list[list[int]], begin: list[int], length: int) -> Iterator[tuple[int, list[int], int]]:
    at = 0
    for document in documents:
        yield at, document[:length], 0
        for place in range(length, len(document), length - len(begin)):
            yield at + place, begin + document[place : place + length - len(begin)], len(begin)
        at += len(document)


@torch.no_grad()
def _nats(model: Any, ids: list[int]) -> list[float]:
    row: Tensor = torch.tensor([ids])
    logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
    losses: list[float] = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none").tolist()
    return losses


def measured(folder: Path, texts: Sequence[str], lengths: Sequence[int], tokens: int) -> Iterator[dict[str, Any]]:
    """One row of the result per packing and length."""
    model = model_from(str(folder), AutoModelForCausalLM, dtype=torch.float32).eval()
    ours, theirs = load_tokenizer(folder), tokenizer_from(str(folder))
    with TemporaryDirectory() as place:
        documents = [Document(str(number), text) for number, text in enumerate(texts)]
        file = write_tokens(Path(place) / "text-0.bin", documents, TextEncoder(ours), len(ours))
        for length in lengths:
            for packing in PACKINGS:
                blocks = PackedRows(file, length, packing=packing)
                bare = PackedRows(replace(file, start=()), length, packing=packing)
                now = in_rows(model, blocks, tokens // length)
                before = in_rows(model, bare, tokens // length + 1)
                # packings of whole documents read each piece of a document separately
                apart = pieces_alone(model, theirs, texts, blocks, length, set(now))
                both = sorted(before.keys() & now.keys() & apart.keys())
                yield {
                    "model": folder.name,
                    "row begins with": " ".join(f"`{token}`" for token in ours.convert_ids_to_tokens(list(file.start)))
                    or "-",
                    "tokens in a row": length,
                    "packing": packing,
                    "predictions": len(both),
                    "nats before": _mean(before, both),
                    "nats now": _mean(now, both),
                    "nats, transformers alone": _mean(apart, both),
                    "perplexity before": math.exp(_mean(before, both)),
                    "perplexity now": math.exp(_mean(now, both)),
                    "largest difference from alone": max(abs(now[token] - apart[token]) for token in now),
                }


def pieces_alone(
    model: Any, tokenizer: Any, texts: Sequence[str], blocks: PackedRows, length: int, wanted: set[int]
) -> Losses:
    """:func:`alone` with the pieces of a packing; only the packing of ``blocks`` is used."""
    if blocks.packing != "documents":
        return alone(model, tokenizer, texts, length, wrapped=blocks.packing == "wrapped", wanted=wanted)
    # split like wrapped rows, but each piece of a document is read separately
    flat = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    begin, found = tokenizer("")["input_ids"], Losses()
    starts = [sum(map(len, flat[:number])) for number in range(len(flat))]
    ids = [token for document in flat for token in document]
    room = length - len(begin)
    cuts = sorted({*range(0, len(ids), room), *starts, len(ids)})
    for at, end in pairwise(cuts):
        if end - at > 1 and wanted & {*range(at, end)}:
            before = [] if at in starts else begin
            nats = _nats(model, before + ids[at:end])
            first = 1 if before else max(1, len(begin))
            found |= {at + i: nats[len(before) + i - 1] for i in range(first, end - at)}
    return found


def _mean(losses: Losses, tokens: Sequence[int]) -> float:
    return sum(losses[token] for token in tokens) / len(tokens)


def documents_of(corpus: Path, count: int, characters: int) -> list[str]:
    """Beginnings of the first documents of a corpus, with different lengths."""
    with gzip.open(corpus / "valid.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return [text[: characters // SHARES[number % len(SHARES)]] for number, text in enumerate(texts[:count])]


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", help="folders of causal language models")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--tokens", type=int, default=2048, help="approximate tokens per packing and length")
    parser.add_argument("--characters", type=int, default=6000, help="characters of the longest document")
    options = parser.parse_args()
    texts, rows = documents_of(options.corpus, 19, options.characters), []
    for folder in options.models:
        for row in measured(folder, texts, options.lengths, options.tokens):
            rows.append(row)
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
    names = " ".join(folder.name.upper().replace("-", "_") for folder in options.models)
    lengths = " ".join(map(str, options.lengths))
    result.write(
        "real_text",
        command=f"python -m benchmarks.real_text {names} --corpus BOOKS --lengths {lengths} --tokens {options.tokens}",
        hardware=hardware.describe(1),
        versions=hardware.versions("torch", "transformers", "tokenizers"),
        rows=rows,
        notes=["In fp32 on the CPU; beginnings of the validation documents, each followed by its end-of-text token."],
    )


if __name__ == "__main__":
    main()
