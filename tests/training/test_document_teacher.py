"""A teacher that reads the document: which positions are compared, against formulas in float64 written apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.core.errors import InputError
from distill.data.corpus import Corpus
from distill.data.document_prompts import document_prompts
from distill.data.micro_batches import MicroBatches
from distill.data.spec import DataSpec
from distill.losses import ForwardKL, ReverseKL
from distill.models.lora import LoraSpec
from distill.training.assemble import assemble
from distill.training.document_teacher import DocumentTeacher
from distill.training.live_teacher import LiveTeacher
from distill.training.module import DistillationModule
from distill.training.on_policy import OnPolicy
from distill.training.own_weights import OwnWeights
from distill.training.spec import OnPolicySpec
from tests.data import chats

ROWS = [
    {"prompt": f"Year of {n}?", "response": f"It was {n * n}." + " Yes." * (n % 3)}
    | ({"document": f"Number {n} is of the year {n * n}. " * (1 + n % 2)} if n % 4 else {})
    for n in range(30)
]


def model(seed: int, positions: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, initializer_range=0.3, eos_token_id=257,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chats.chat_tokenizer(chats.PLAIN, (*chats.IM, "<|end|>", "<|pad|>"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSpec, Path]:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return DataSpec.model_validate(
        {"train": {"kind": "chat", "path": str(folder / "rows.jsonl")}, "sequence_length": 160, "held_out": 0.1}
    ), folder


@pytest.fixture(scope="module", params=["best_fit", "padded"])
def batches(request: pytest.FixtureRequest, text: tuple[DataSpec, Path], tokenizer: Any) -> list[dict[str, Any]]:
    data = text[0].model_copy(update={"packing": request.param})
    corpus = Corpus.open(data, tokenizer, text[1] / request.param, 0, len(tokenizer))
    loader = iter(corpus.train_loader(MicroBatches(2)))
    return [next(loader) for _ in range(3)]


def rows_in(batch: dict[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """The conversations of a batch, found by their text."""
    written = "".join(tokenizer.decode(row) for row in batch["input_ids"])
    return [
        row
        for row in ROWS
        for _ in range(written.count(f"user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['response']}<"))
    ]


def by_hand(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, rows: list[dict[str, Any]], tokenizer: Any
) -> tuple[torch.Tensor, int]:
    """Sum over the tokens of the answers of KL(teacher || student), in float64, a conversation at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        answer = tokenizer(f"{row['response']}<|im_end|>").input_ids
        said = f"{row['document'].strip()}\n\n{row['prompt']}" if row.get("document") else row["prompt"]
        logs = []
        for one, asked in ((student, row["prompt"]), (teacher, said)):
            prompt = tokenizer(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n").input_ids
            logits = one(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logs.append(logits.log_softmax(-1))
        ours, theirs = logs
        total = total + (theirs.exp() * (theirs - ours)).sum()
        count += len(answer)
    return total, count


def test_losses_and_gradients_are_those_of_the_formula(
    batches: list[dict[str, Any]], text: tuple[DataSpec, Path], tokenizer: Any
) -> None:
    student, teacher = model(1), model(2)
    prompts = document_prompts(text[0], tokenizer)
    assert prompts.num_rows == len([row for row in ROWS if "document" in row])
    assert prompts.num_refused == 0
    module = DistillationModule(student, [ForwardKL()], DocumentTeacher(LiveTeacher(teacher), prompts))
    exact = model(1).double(), model(2).double()
    for _ in range(2):  # the second time from memory
        for batch in batches:
            student.zero_grad()
            total, terms = module.batch_losses(batch, [("forward_kl", ForwardKL())])
            total.backward()
            rows = rows_in(batch, tokenizer)
            exact[0].zero_grad()
            wanted, count = by_hand(*exact, rows, tokenizer)
            wanted.backward()
            assert int(terms["forward_kl"].count) == count == int(batch["mask"].sum())
            assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
            for ours, theirs in zip(student.parameters(), exact[0].parameters(), strict=True):
                assert ours.grad is not None
                assert theirs.grad is not None
                assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)
    plain, _ = DistillationModule(student, [ForwardKL()], LiveTeacher(teacher)).batch_losses(
        batches[0], [("forward_kl", ForwardKL())]
    )
    assert abs(float(plain) - float(by_hand(*exact, rows_in(batches[0], tokenizer), tokenizer)[0])) > 0.01


def test_the_student_itself_is_the_teacher(
    batches: list[dict[str, Any]], text: tuple[DataSpec, Path], tokenizer: Any
) -> None:
    student = assemble(model(1), lora=LoraSpec(r=2)).model
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)  # as after some training
    teacher = DocumentTeacher(OwnWeights(student), document_prompts(text[0], tokenizer))
    module = DistillationModule(student, [ForwardKL()], teacher)
    merged = assemble(model(1), lora=LoraSpec(r=2)).model
    merged.load_state_dict(student.state_dict())
    for batch in batches:
        total, _ = module.batch_losses(batch, [("forward_kl", ForwardKL())])
        wanted, _ = by_hand(merged.double(), model(1).double(), rows_in(batch, tokenizer), tokenizer)
        assert float(total) == pytest.approx(float(wanted), rel=1e-4)


def test_what_the_teacher_says_does_not_depend_on_the_batch(
    batches: list[dict[str, Any]], text: tuple[DataSpec, Path], tokenizer: Any
) -> None:
    prompts = document_prompts(text[0], tokenizer)
    once = DocumentTeacher(LiveTeacher(model(2)), prompts)
    for batch in batches:
        fresh = DocumentTeacher(LiveTeacher(model(2)), prompts)
        alone = torch.cat([fresh.signal({k: v[i : i + 1] for k, v in batch.items()}).hidden for i in range(2)])
        assert torch.equal(once.signal(batch).hidden, alone)
        assert torch.equal(once.signal(batch).hidden, alone)  # from memory


def test_samples_of_the_student_get_the_document_too(
    batches: list[dict[str, Any]], text: tuple[DataSpec, Path], tokenizer: Any
) -> None:
    student, teacher = model(1), model(2)
    policy = OnPolicy(
        OnPolicySpec(share=1.0, max_new_tokens=6), seed=0, ends=[257], vocabulary=264, row_of_conversations=160
    )
    source = DocumentTeacher(LiveTeacher(teacher), document_prompts(text[0], tokenizer))
    module = DistillationModule(student, [ReverseKL()], source, on_policy=policy)
    sampled = policy.source(student, batches[0], module.losses, 0, 10, 0).batch
    total, _ = module.batch_losses(sampled, [("reverse_kl", ReverseKL())])
    assert not source._kept  # they do not return
    source.signal(batches[0])
    assert source._kept
    wanted = torch.zeros((), dtype=torch.float64)
    ours, theirs = model(1).double(), model(2).double()
    documents = {row["prompt"]: row.get("document") for row in ROWS}
    for ids, mask in zip(sampled["input_ids"], sampled["mask"], strict=True):
        if not mask.any():
            continue
        first, last = int(mask.int().argmax()), int(mask.nonzero()[-1])
        prompt, written = ids[: first + 1], ids[first + 1 : last + 2].tolist()
        asked = tokenizer.decode(prompt).split("user\n")[1].split("<|im_end|>")[0]
        said = f"{documents[asked].strip()}\n\n{asked}" if documents[asked] else asked
        before = tokenizer(f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n").input_ids
        logs = [
            one(torch.tensor([start + written])).logits[0, len(start) - 1 : -1].log_softmax(-1)
            for one, start in ((ours, prompt.tolist()), (theirs, before))
        ]
        wanted += (logs[0].exp() * (logs[0] - logs[1])).sum()
    assert float(total) == pytest.approx(float(wanted), rel=1e-4)


def of_rows(folder: Path, rows: list[dict[str, Any]], **more: Any) -> DataSpec:
    (folder / "some.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    text = {"train": {"kind": "chat", "path": str(folder / "some.jsonl")}, "sequence_length": 160}
    return DataSpec.model_validate({**text, **more})


A, B = (dict[str, Any](prompt="Year?", response="It was 5.", document=f"Of {name}.") for name in "AB")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([A, B], r"jsonl:2 has the same prompt as .*jsonl:1, with another document"),
        ([{**A, "document": ""}, A], r"jsonl:1 has the same prompt as .*jsonl:2, without a document"),
        ([{**A, "document": {"id": 3}}], r"jsonl:1: its column document needs a text \(got dict\)"),
    ],
)
def test_a_prompt_has_one_document(rows: list[dict[str, Any]], said: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        document_prompts(of_rows(tmp_path, rows), tokenizer)


def test_equal_rows_and_rows_without_a_document_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [A, A, {"prompt": "Other?", "response": "No."}, {"prompt": "Third?", "response": "No.", "document": None}]
    found = document_prompts(of_rows(tmp_path, rows), tokenizer)
    assert (found.num_rows, found.num_without, len(found.by_prompt)) == (2, 2, 1)


TURNS = [chats.user("One?"), chats.assistant("First."), chats.user("Two?"), chats.assistant("Second.")]


@pytest.mark.parametrize(
    ("messages", "chat", "learned"),
    [
        (TURNS, {}, [1, 3]),
        ([TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]], {}, [3]),
        (TURNS, {"learn_from": "last"}, [1, 3]),  # what validates is learned from at each turn
    ],
)
def test_each_learned_turn_has_its_prompt(
    messages: list[dict[str, Any]], chat: dict[str, Any], learned: list[int], tokenizer: Any, tmp_path: Path
) -> None:
    row = {"messages": messages, "document": "Of A."}
    found = document_prompts(of_rows(tmp_path, [row], chat=chat), tokenizer)
    found.check(None)
    said = [f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in TURNS]
    wanted = {}
    for turn in learned:
        before = "".join(said[:turn]) + "<|im_start|>assistant\n"
        shown = before.replace("One?", "Of A.\n\nOne?")
        wanted[np.array(tokenizer(before).input_ids, np.int64).tobytes()] = tokenizer(shown).input_ids
    assert {key: prompt.tolist() for key, prompt in found.by_prompt.items()} == wanted


def test_turns_in_rows_of_their_own_and_tools_keep_the_document(tmp_path: Path) -> None:
    tokenizer = chats.chat_tokenizer(chats.REWRITES, (*chats.IM, "<|end|>", "<|pad|>"))
    found = document_prompts(of_rows(tmp_path, [{"messages": chats.THOUGHT, "document": "Of A."}]), tokenizer)
    found.check(None)
    assert len(found.by_prompt) == 2
    assert all("Of A." in tokenizer.decode(prompt) for prompt in found.by_prompt.values())
    named = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + chats.CALLS
    tokenizer = chats.chat_tokenizer(named, (*chats.IM, "<|end|>", "<|pad|>"))
    tools: Any = chats.WHOLE["tools"]
    row = {"messages": chats.WITH_TOOLS, "document": "Of A.", "tools": tools[:1]}
    found = document_prompts(of_rows(tmp_path, [row]), tokenizer)
    found.check(None)
    assert all(
        str(tokenizer.decode(prompt)).startswith("f<|im_start|>user\nOf A.") for prompt in found.by_prompt.values()
    )


def test_rows_that_cannot_be_read_are_refused(text: tuple[DataSpec, Path], tokenizer: Any, tmp_path: Path) -> None:
    prompts = document_prompts(text[0], tokenizer)
    with pytest.raises(InputError, match=r"rows\.jsonl:\d+ has [\d,]+ tokens with its document, more than the"):
        DocumentTeacher(LiveTeacher(model(2, positions=60)), prompts)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n}?", "response": "a"}) for n in range(9)))
    none = document_prompts(
        DataSpec.model_validate({"train": {"kind": "chat", "path": str(tmp_path)}, "sequence_length": 64}), tokenizer
    )
    with pytest.raises(InputError, match="no row of the text has a column document"):
        DocumentTeacher(LiveTeacher(model(2)), none)
    assert prompts.find(np.array([1, 2])) is None
