"""Words that could stand in the place of others, as an encoder predicts them from the text around.

The words to be replaced are masked, a part of them at a time: at most :data:`SHARE` of the tokens that the encoder
reads, as in its own pretraining, so that enough text is left to predict from. A word has candidates if it is one token
of the encoder; a long text is read in windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.stop import stoppable
from distill.models.whole_words import best, whole_words

SHARE = 0.15
"""Of tokens that are masked in the pretraining of BERT and its successors (arXiv 1810.04805)."""
WINDOW = 256
"""Tokens that the encoder reads at once, at most, those around a text among them."""
_AT_ONCE = 2**26
"""Logits that exist at once."""


@dataclass(frozen=True)
class _Window:
    """Some tokens of a text, with some of them masked.

    Attributes:
        ids: with the tokens around a text.
        masked: place in the window, number of the text, number of the word among those of its text.
    """

    ids: list[int]
    masked: list[tuple[int, int, int]]


class MaskedWords:
    """Finds them.

    Args:
        model: predicts masked tokens; in evaluation mode.
        backend: of its tokenizer, of class ``tokenizers.Tokenizer``.
        around: ids that the tokenizer puts before and behind a text.
        mask: id of the mask token.
        location: what a message calls the model.

    Raises:
        InputError: the tokenizer has no whole words.
    """

    def __init__(self, model: nn.Module, backend: Any, around: tuple[list[int], list[int]], mask: int, location: str):
        self.model, self._backend, self._around, self._mask = model, backend, around, mask
        ids, self.words = whole_words(backend, location)
        self._ids = torch.from_numpy(ids)  # [words]

    def find(
        self, texts: Sequence[str], places: Sequence[Sequence[tuple[int, int]]], count: int
    ) -> list[list[list[str]]]:
        """See :class:`distill.data.replace_words.Candidates`."""
        found: list[list[list[str]]] = [[[] for _ in some] for some in places]
        encoded = self._backend.encode_batch(list(texts), add_special_tokens=False)
        windows = [
            window
            for number, (encoding, some) in enumerate(zip(encoded, places, strict=True))
            for window in self._windows(encoding, texts[number], some, number)
        ]
        windows.sort(key=lambda window: len(window.ids))  # like lengths together
        size = max(1, _AT_ONCE // (WINDOW * self._backend.get_vocab_size()))
        for start in stoppable(range(0, len(windows), size)):
            some_windows = windows[start : start + size]
            logits = self._predict(some_windows)  # [masked, words]
            order = logits.topk(min(2 * (count + 1), len(self.words)), dim=-1).indices.tolist()
            masked = [place for window in some_windows for place in window.masked]
            for (_, text, word), numbers in zip(masked, order, strict=True):
                first, last = places[text][word]
                found[text][word] = best(self.words, numbers, texts[text][first:last], count)
        return found

    def _windows(self, encoding: Any, text: str, places: Sequence[tuple[int, int]], number: int) -> Iterator[_Window]:
        """What the encoder is to read of a text so that each word which is a token is masked once."""
        token_at = {}
        for token, (first, last) in enumerate(encoding.offsets):
            piece = text[first:last]  # offsets of byte-level BPE and SentencePiece include the space before the word
            token_at[first + len(piece) - len(piece.lstrip()), last] = token
        tokens = {token_at[place]: word for word, place in enumerate(places) if place in token_at}
        before, behind = self._around
        length = WINDOW - len(before) - len(behind)
        for start in range(0, len(encoding.ids), length):
            ids = encoding.ids[start : start + length]
            own = [token for token in range(start, start + len(ids)) if token in tokens]
            parts = -(-len(own) // max(1, int(SHARE * len(ids))))
            for part in range(parts):
                masked = own[part::parts]
                read = list(ids)
                for token in masked:
                    read[token - start] = self._mask
                places_in_it = [(len(before) + token - start, number, tokens[token]) for token in masked]
                yield _Window([*before, *read, *behind], places_in_it)

    @torch.inference_mode()
    def _predict(self, windows: Sequence[_Window]) -> Tensor:
        """Logits of the whole words at all masked places, window by window. fp32 [masked, words]"""
        device = next(self.model.parameters()).device
        width = max(len(window.ids) for window in windows)
        ids = torch.full((len(windows), width), self._mask)  # [windows, width]; filling is not attended to
        attended = torch.zeros_like(ids)
        for row, window in enumerate(windows):
            ids[row, : len(window.ids)] = torch.tensor(window.ids)
            attended[row, : len(window.ids)] = 1
        logits = self.model(input_ids=ids.to(device), attention_mask=attended.to(device)).logits
        rows = torch.tensor([row for row, window in enumerate(windows) for _ in window.masked], device=device)
        columns = torch.tensor([place for window in windows for place, _, _ in window.masked], device=device)
        return logits[rows, columns][:, self._ids.to(device)].float()
