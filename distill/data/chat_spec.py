"""The `data.chat` section of a recipe: how conversations become text, and what of it is learned."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from distill.core.errors import InputError
from distill.core.outside import is_folder, read, read_json
from distill.core.spec import Spec

LearnFrom = Literal["assistant", "all", "last"]
TooLong = Literal["drop", "cut_turns"]
Text = str | dict[str, str]
"""Of a template; some tokenizers have several by name, of which ``tool_use`` is for conversations with tools."""
_OURS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")


class ChatSpec(Spec):
    """How conversations become rows: by which chat template, and which of their tokens are learned from."""

    template: str = "teacher"
    """`teacher`, `student` (that of the model which the first training starts from), a `.jinja` file, or the template
    itself. Student and teacher both read by this one, and models of the run are saved with it."""
    arguments: dict[str, Any] = Field({})
    """Arguments of the template, such as {enable_thinking: false}; a row's `chat_template_kwargs` override them."""
    today: date | None = None
    """The date for templates that ask for today's, such as 2026-01-01: else the text would change from day to day."""
    learn_from: LearnFrom = "assistant"
    """Of the training text. assistant: what the assistant writes, with the stop token; last: its last turn alone; all:
    every token, prompts too. Validation counts what the assistant writes, whatever stands here."""
    too_long: TooLong = "drop"
    """Conversations of more tokens than sequence_length. drop: left out and counted; cut_turns: the turns that end
    within it are kept. Nothing is cut inside a turn."""

    def written(self) -> Text | None:
        """The template that the recipe names without a model; None where it is a model's.

        Raises:
            InputError: there is no such file.
        """
        if self.template in ("teacher", "student"):
            return None
        if "{" in self.template:  # no name of a file
            return self.template
        if (text := read_template(self.template)) is None:
            raise InputError(f"data.chat.template: {self.template}: no such file, seen from {Path.cwd()}")
        return text

    @field_validator("arguments")
    @classmethod
    def _only_the_templates_own(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if ours := [name for name in arguments if name in _OURS]:
            raise ValueError(f"{ours[0]} is set for each conversation, so it has no effect here; remove it")
        return arguments


def read_template(location: str | Path) -> Text | None:
    """The template in a model folder, or in a file; None when there is none. Needs no transformers.

    Raises:
        InputError: a file cannot be read.
    """
    place = Path(location)
    file = place / "chat_template.jinja" if is_folder(place) else place
    if file.exists():
        try:
            return read(file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: cannot be read as a chat template ({error})") from None
    if not (config := place / "tokenizer_config.json").is_file():
        return None
    found = read_json(config).get("chat_template")
    if isinstance(found, list):  # of {name, template}
        return {str(one.get("name")): str(one.get("template")) for one in found if isinstance(one, dict)}
    return found if isinstance(found, str) else None
