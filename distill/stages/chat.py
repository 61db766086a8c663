"""Which chat template a run's conversations are written by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from distill.core.errors import InputError
from distill.data.chat_spec import ChatSpec, Text
from distill.data.spec import DataSpec
from distill.stages.base import StageSpec
from distill.training.spec import BudgetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from distill.data.chat_encoder import ChatPrompts


def template_of(data: DataSpec, stages: Mapping[str, StageSpec], locate: Callable[[str], str]) -> Text | None:
    """The text of the template; None where there are no conversations.

    Args:
        data: the recipe's ``data`` section.
        stages: of the recipe, in order.
        locate: a reference of a model from outside -> its folder or Hub id.

    Raises:
        InputError: the model that the recipe names has none, or the file cannot be read.
    """
    from distill.data.tokenizer import load_tokenizer

    if not data.holds_conversations:
        return None
    chat = data.chat or ChatSpec()
    if (written := chat.written()) is not None:
        return written
    wanted = chat.template
    reference = "teacher" if wanted == "teacher" else first_student(stages)
    text = load_tokenizer(locate(reference)).chat_template
    if not text:
        other = "student" if wanted == "teacher" else "teacher"
        raise InputError(
            f"data.chat.template: the {wanted} ({locate(reference)}) has no chat template; take the {other}'s, if it "
            "has one, or name a .jinja file"
        )
    return text


def prompts_of(data: DataSpec, template: Text | None) -> ChatPrompts | None:
    """What makes prompts of what a user says; None where there are no conversations.

    Args:
        data: the recipe's ``data`` section.
        template: of :func:`template_of`.
    """
    from distill.data.chat_encoder import ChatPrompts

    return None if template is None else ChatPrompts(template, data.chat or ChatSpec())


def first_student(stages: Mapping[str, StageSpec]) -> str:
    """The model from outside that the first training, or the first stage that makes a model, starts from."""
    made: dict[str, str] = {}  # stage -> the model from outside that it goes back to
    for name, stage in stages.items():
        if not stage.makes_model:
            continue
        source = next((reference for _, reference in stage.references()), "teacher")  # none of a new model
        made[name] = made.get(source, source)
        if isinstance(stage, BudgetSpec):
            return made[name]
    return next(iter(made.values()), "teacher")


def other_templates(
    used: PreTrainedTokenizerFast,
    data: DataSpec,
    stages: Mapping[str, StageSpec],
    locate: Callable[[str], str],
    teacher: str | None,
) -> list[str]:
    """A line for the teacher and the first student each where its own template is another one than the run's.

    Args:
        used: the run's tokenizer, with the run's template.
        data: the recipe's ``data`` section.
        stages: of the recipe, in order.
        locate: a reference of a model from outside -> its folder or Hub id.
        teacher: the recipe's.
    """
    from distill.data.chat_probe import differences
    from distill.data.chat_template import ChatTemplate
    from distill.data.tokenizer import load_tokenizer

    chat, lines = data.chat or ChatSpec(), []
    models = {"teacher": "teacher"} if teacher is not None else {}
    models |= {"student": student} if (student := first_student(stages)) != "teacher" else {}
    for who, reference in models.items():
        own = load_tokenizer(locate(reference))
        if not own.chat_template:
            lines.append(f"chat template: the {who} has none; it reads by the run's")
        elif own.chat_template != used.chat_template:
            for difference in differences(ChatTemplate.of(used, chat), ChatTemplate.of(own, chat)):
                lines.append(f"chat template: the run's against the {who}'s own, {difference}")
    return lines
