"""Chat templates of one trait each, and tokenizers that know their tokens; real ones are programs of others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

IM = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + ' ' + call.function.arguments | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# reasoning is shown in the turns after the last question alone
REWRITES = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# the prompt opens a thought that the text never has
THINKS_IN_PROMPT = PLAIN.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# ... unless it is told otherwise
MAY_THINK = PLAIN.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' + ('' if enable_thinking is false else '<think>\n') }}",
).replace("enable_thinking is false", "enable_thinking is defined and enable_thinking is false")
NO_STOP = PLAIN.replace("m.content + '<|im_end|>\n'", "m.content + '\n'")
# what the system says stands with the last question
SYSTEM_MOVED = (
    "{% set ns = namespace(last=0, system='') %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% elif m.role == 'system' %}{% set ns.system = m.content + '\n' %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + "
    "(ns.system if loop.index0 == ns.last else '') + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = "{{ '<|im_start|>system\nIt is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + PLAIN
# another token behind the last turn, which no model writes
CLOSED = PLAIN + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
# the last turn ends with another token than those before it
LAST_ENDS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = PLAIN.replace("m.content", "m.content[0].text")
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + PLAIN
# roles are marked by tokens that its tokenizer does not call special
ROLES = (
    "{% for m in messages %}{{ ('<user>' if m.role == 'user' else '<bot>') + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
)
ARGUMENTS_AS_TEXT = CALLS.replace("call.function.arguments | tojson", "call.function.arguments")
DROPS_ANSWERS = PLAIN.replace("m.content", "m.content[:16]")


def chat_tokenizer(
    template: str | None, special: tuple[str, ...] = IM, others: tuple[str, ...] = THINK
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with added tokens, special ones and others, and a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in others])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    return tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


TWO_TURNS = [user("How are you?"), assistant("Well, thank you."), user("And she?"), assistant("So so.")]
THOUGHT = [
    user("How are you?"),
    assistant("Well.", reasoning_content="I am."),
    user("And she?"),
    assistant("So so.", reasoning_content="She is."),
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
WITH_TOOLS = [
    user("Rain?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "dry"},
    assistant("No."),
]


ODD = [
    None,
    0,
    1.5,
    True,
    "",
    "x",
    [],
    {},
    [None],
    {"role": "user"},
    "\ud800",
    [[]],
    {"type": "text"},
    "{",
    "<|im_end|>",
]
WHOLE = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "r", "weight": 1},
        {"role": "tool", "content": {"a": 1}, "name": "f"},
        {"role": "assistant", "content": "a", "train": True},
    ],
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "system": "",
}


def damaged_rows(count: int) -> Iterator[Any]:
    """Rows in which something stands where something else was expected, or is not there, or is there twice."""
    draw = random.Random(0)

    def damaged(value: Any, depth: int = 0) -> Any:
        if draw.random() < 0.04 * (depth > 0):
            return draw.choice(ODD)
        if isinstance(value, dict):
            return {key: damaged(item, depth + 1) for key, item in value.items() if draw.random() > 0.01}
        if isinstance(value, list):
            return [damaged(item, depth + 1) for item in value for _ in range(draw.choice((1,) * 30 + (0, 2)))]
        return value

    return (damaged(WHOLE) for _ in range(count))
