"""Where the words come from that `data.augment` puts in place of others: a model, loaded when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distill.core.artifact import fingerprint
from distill.core.errors import InputError
from distill.data.augment_spec import ReplaceWords
from distill.data.encoder import backend_of
from distill.data.first_tokens import around
from distill.data.spec import DataSpec
from distill.models.load import load_config, load_model, task_of
from distill.models.masked_words import MaskedWords
from distill.models.word_neighbours import WordNeighbours
from distill.pretrained import tokenizer_from

if TYPE_CHECKING:
    from distill.data.replace_words import WordSpan
    from distill.training.spec import ComputeSpec

KEY = "data.augment.replace_words.model"


class ModelOfWords:
    """A :class:`~distill.data.replace_words.Candidates` whose model is loaded when it is first asked.

    Args:
        spec: which model, and how it is asked.
        location: of the model.
        compute: where an encoder runs.
    """

    def __init__(self, spec: ReplaceWords, location: str, compute: ComputeSpec):
        self.spec, self.location, self.compute = spec, location, compute

    def identity(self) -> list[Any]:
        """The model's content; how it is asked is in the spec."""
        return [fingerprint(self.location)]

    def find(self, texts: Sequence[str], places: Sequence[Sequence[WordSpan]], count: int) -> list[list[list[str]]]:
        """See :class:`~distill.data.replace_words.Candidates`.

        Raises:
            InputError: the model cannot be loaded, has another task, or no words.
        """
        return self._loaded.find(texts, places, count)

    @cached_property
    def _loaded(self) -> WordNeighbours | MaskedWords:
        tokenizer: Any = tokenizer_from(self.location)
        backend = backend_of(tokenizer)
        if self.spec.candidates == "embeddings":
            model: Any = load_model(self.location, tasks=("causal_lm", "masked_lm"))
            return WordNeighbours(model.get_input_embeddings().weight, backend, self.location)
        if task_of(load_config(self.location)) != "masked_lm" or tokenizer.mask_token_id is None:
            raise InputError(
                f"{KEY}: {self.location} does not predict masked words; name an encoder that does (such as "
                "distilbert/distilbert-base-cased), or take candidates: embeddings"
            )
        from distill.training.trainer import resolve_device  # Lightning, which takes seconds to import

        device = resolve_device(self.compute)
        encoder = load_model(self.location, dtype="float32", device=device, tasks=("masked_lm",))
        return MaskedWords(encoder, backend, around(tokenizer), int(tokenizer.mask_token_id), self.location)


def candidates_of(data: DataSpec, locate: Callable[[str], str], compute: ComputeSpec) -> ModelOfWords | None:
    """Where words come from; None where none are replaced.

    Args:
        data: the recipe's ``data`` section.
        locate: a reference of a model from outside -> its folder or Hub id.
        compute: where an encoder runs.
    """
    if data.augment is None:
        return None
    spec = data.augment.replace_words
    return ModelOfWords(spec, locate(spec.model), compute)
