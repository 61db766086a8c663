"""Rows of conversations with real chat templates, compared with hand-written rules for each template.

`python -m benchmarks.chat_templates TEMPLATES` takes a folder of ``*.jinja`` files, such as the one in the wheel of TRL
(``trl/chat_templates``). Templates whose names end in ``_training`` were changed by TRL and are skipped. There are two
references:

    text of the assistant   rules for each template in ``chat_templates.rules.json``: the form of an answer, of an
                            answer after a thought, and of a tool call; in which conversations earlier turns are
                            separate rows; or the reason why a conversation is rejected
    text before it          the prompt that transformers' ``apply_chat_template`` makes of the earlier messages

For each template, a tokenizer is made of single bytes and the special tokens that the template writes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import hardware, result
from distill.core.errors import InputError
from distill.data.base import Rejected
from distill.data.chat_encoder import ChatEncoder
from distill.data.chat_spec import ChatSpec
from distill.data.conversation import Columns, conversation_of
from distill.data.encoder import Row

RULES = Path(__file__).with_name("chat_templates.rules.json")
PAGE = Path(__file__).parents[1] / "docs" / "data.md"
BEGIN, END = "<!-- made by benchmarks/chat_templates.py -->", "<!-- end -->"
TODAY = date(2026, 1, 1)
TOKENS = re.compile(
    r"<\|[^<>|\s]{1,40}\|?>|<[a-z_]{2,30}\|>|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn|"
    r"end_of_utterance|s|tools|start_of_image)>|<\uff5c[^\uff5c]+\uff5c>|<\|\"\|>"
)
"""Matches the special tokens that these templates write."""
USER = [{"role": "user", "content": f"Question {number}?"} for number in (1, 2)]
ANSWERS = ["The first answer.", "The second answer."]
THOUGHTS = ["The first thought.", "The second thought."]
ARGUMENT = "Paris 75"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}},
            "required": ["city"],
        },
    },
}


def _said(number: int, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": ANSWERS[number], **more}


TWO = [USER[0], _said(0), USER[1], _said(1)]
CALL = {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": {"city": ARGUMENT}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": TWO[:2],
    "two turns": TWO,
    "a system message": [{"role": "system", "content": "Be brief."}, *TWO],
    "reasoning": [
        USER[0],
        _said(0, reasoning_content=THOUGHTS[0]),
        USER[1],
        _said(1, reasoning_content=THOUGHTS[1]),
    ],
    "tool calls": [
        USER[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "call00000", "content": "Dry."},
        _said(1),
    ],
}


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes and the special tokens that a template writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for token in dict.fromkeys(["<BOS>", "<EOS>", *TOKENS.findall(template)]):
        backend.add_tokens([AddedToken(token, special="think" not in token and "tool" not in token, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<BOS>", eos_token="<EOS>")
    tokenizer.chat_template = template
    return tokenizer


def expected(rule: Mapping[str, Any], name: str) -> list[list[str]] | str:
    """The assistant's turns in each row, according to the rules; or the reason why the conversation is rejected."""
    if name in rule.get("refused", {}):
        return str(rule["refused"][name])
    if name == "tool calls":
        turns = [rule["call"].replace("{argument}", ARGUMENT)]
        turns.append(rule.get("after_call", rule.get("answer", "")).replace("{answer}", ANSWERS[1]))
    else:
        form = rule.get("thought", rule.get("answer")) if name == "reasoning" else rule["answer"]
        filled = (form.replace("{answer}", a).replace("{thought}", t) for a, t in zip(ANSWERS, THOUGHTS, strict=True))
        turns = list(filled)[: 1 if name == "one turn" else 2]
    return [[turn] for turn in reversed(turns)] if name in rule.get("own", ()) else [turns]


def written(row: Row, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, list[int]]]:
    """The text of each turn of a row that is learned from, and the ids before it."""
    assert row.learned is not None
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.learned.astype(int), [0]])))
    return [(tokenizer.decode(row.ids[a:b]), row.ids[:a]) for a, b in edges.reshape(-1, 2)]


def prompts(
    encoder: ChatEncoder, tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], told: Mapping[str, Any],
    tools: list[dict[str, Any]] | None,
) -> list[list[int]]:  # fmt: skip
    """The prompt of each turn at inference, made by transformers only."""
    template = encoder.rendering.template
    shaped = [template._shaped(message) for message in messages]
    text = re.sub(r"strftime_now\((.*?)\)", lambda call: repr(TODAY.strftime(call[1].strip("'\""))), template.text)
    return [
        tokenizer.apply_chat_template(
            shaped[:number], tools=tools, chat_template=text, add_generation_prompt=True, return_dict=True, **told
        )["input_ids"]
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def cells(template: str, name: str, rule: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row of the result per conversation."""
    told = {"enable_thinking": name.endswith("true")} if ", enable_thinking" in name else {}
    tokenizer, about = tokenizer_of(template), {"table": "conversations", "template": name}
    try:
        encoder = ChatEncoder(tokenizer, ChatSpec(today=TODAY, arguments=told), 4096)
    except InputError as error:
        for conversation in CONVERSATIONS:
            as_ruled = str(rule.get("unusable", "never")) in str(error)
            yield about | {"conversation": conversation, "outcome": "no stop token", "as_by_hand": as_ruled}
        return
    for conversation, messages in CONVERSATIONS.items():
        tools = [TOOL] if conversation == "tool calls" else None
        asked = conversation_of({"messages": messages, "tools": tools}, conversation, Columns())
        (made,) = encoder.rows([asked], with_bytes=False)
        if isinstance(made, Rejected):
            outcome, as_ruled = made.reason, expected(rule, conversation) == made.reason
        else:
            turns = [written(row, tokenizer) for row in made.rows]
            before = prompts(encoder, tokenizer, list(asked.messages), told, tools)
            outcome = f"{len(turns)} row" + "s" * (len(turns) > 1)
            as_ruled = [[text for text, _ in row] for row in turns] == expected(rule, conversation)
            as_ruled = as_ruled and sorted(ids for row in turns for _, ids in row) == sorted(before)
        yield about | {"conversation": conversation, "outcome": outcome, "as_by_hand": as_ruled}


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table for the docs, with one line per template."""
    names = list(CONVERSATIONS)
    lines = ["| template | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for template in dict.fromkeys(row["template"] for row in rows):
        outcomes = {row["conversation"]: row for row in rows if row["template"] == template}
        lines.append(f"| {template} | " + " | ".join(_shown(outcomes[name]) for name in names) + " |")
    resolved = sum(row["outcome"].startswith(tuple("123456789")) for row in rows)
    templates = len({row["template"].partition(",")[0] for row in rows})
    alike = sum(row["as_by_hand"] for row in rows)
    said = (
        f"{templates} templates, {len(rows)} conversations: {resolved} converted to rows, {len(rows) - resolved} "
        f"rejected with a reason; {alike} of {len(rows)} match the hand-written expectations."
    )
    return "\n".join([said, "", *lines])


def _shown(row: Mapping[str, Any]) -> str:
    short = row["outcome"].removeprefix("the template ")
    return short if row["as_by_hand"] else f"{short} **(not as by hand)**"


def write_page(rows: list[dict[str, Any]], page: Path = PAGE) -> None:
    """Write the table to its place in the docs."""
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    """Compare all templates of a folder for which there are rules, and write the result and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("templates", type=Path, help="folder of *.jinja files")
    folder: Path = parser.parse_args().templates
    rules = json.loads(RULES.read_text(encoding="utf-8"))
    files = {file.stem: file for file in folder.glob("*.jinja") if not file.stem.endswith("_training")}
    known = {name.partition(",")[0] for name in rules}
    rows = [
        cell
        for name, rule in sorted(rules.items())
        if (file := files.get(name.partition(",")[0])) is not None
        for cell in cells(file.read_text(encoding="utf-8"), name, rule)
    ]
    notes = [f"no rule is written down for {name}" for name in sorted(files.keys() - known)]
    result.write(
        "chat_templates",
        command="python -m benchmarks.chat_templates TEMPLATES",
        hardware=hardware.describe(1),
        versions=hardware.versions("jinja2", "tokenizers"),
        rows=rows,
        notes=["Templates of the wheel of TRL 1.16.0 (Apache-2.0; each belongs to its model).", *notes],
    )
    write_page(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
