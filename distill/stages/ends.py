"""Whether the models of a training end a text as the run's text does.

A base teacher and a chat-tuned student of one family share every token id and end a text by different ones. They can
learn from each other, but the student learns the end that the run's text has, and may not stop there afterwards. What a
text is padded with has no part in training: padding is never predicted and never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill.stages.base import SELF
from distill.training.ends import Ends, ends_of, said

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from distill.stages.session import StageContext


def differences(
    context: StageContext, student: PreTrainedModel, teacher: str | None = None, stops: Sequence[int] = ()
) -> list[str]:
    """A line for each model that ends a text otherwise than the run's text does.

    Args:
        context: of the stage.
        student: what is trained.
        teacher: reference of the teacher, of its cache, or "self"; None without one.
        stops: ids that end a turn of a conversation; none where the text is no conversations.
    """
    session = context.session
    if not session.data.task.is_causal:  # such a model generates nothing
        return []
    if session.is_cut:  # there ids are others, and the models are cut to end as the run's text does
        return []
    generation = student.generation_config
    ends: Ends = generation.eos_token_id if generation is not None else None
    models = [("the student", ends)]
    if teacher is not None and teacher != SELF:
        models.append(("the teacher", _eos_of(session.artifact(teacher).location)))
    tokenizer = session.tokenizer()
    of_text = {*stops} or {int(tokenizer.eos_token_id)}
    return [line for who, ends in models for line in _ends(who, ends_of(ends), of_text, tokenizer)]


def _eos_of(location: str) -> Ends:
    from distill.models.load import load_config
    from distill.pretrained import generation_config_from

    generation = generation_config_from(location)
    found: Ends = generation.eos_token_id if generation is not None else None
    return found if found is not None else getattr(load_config(location).get_text_config(), "eos_token_id", None)


def _ends(who: str, theirs: set[int], of_text: set[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    if not theirs or theirs & of_text:
        return []
    effect = {
        "the student": "it learns to end as the text does, and transformers does not stop there; add that token to "
        "eos_token_id in its generation_config.json, or set data.tokenizer",
        "the teacher": "its predictions at the end of a document teach little; set data.tokenizer: teacher, or take "
        "another teacher",
    }[who]
    named, run = _named(theirs, tokenizer), _named(of_text, tokenizer)
    return [f"{who} ends a text with token {named}, the run's text with {run}: {effect}"]


def _named(ids: set[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return said(ids, {id_: str(tokenizer.convert_ids_to_tokens(id_)) for id_ in ids if id_ < len(tokenizer)})
