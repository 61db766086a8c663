"""The benchmark of real models at the size of a test: all arms are measured once, and compared in pairs."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import (
    real_model_arms,
    real_model_cuts,
    real_model_peers,
    real_model_rows,
    real_model_tasks,
    real_models,
    tables,
)
from benchmarks.real_model_rows import Measured
from distill.pretrained import model_from, tokenizer_from

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
OUTSIDE = 106_203_456
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}!{% endfor %}"


def test_the_page_of_results_is_made_of_the_results() -> None:
    page = tables.RESULTS_PAGE.read_text(encoding="utf-8")
    assert page == tables.render_results(), "run `python -m benchmarks.tables`"


def test_the_page_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    assert "##" not in tables.render_results(tmp_path)


@pytest.mark.parametrize("share", real_model_cuts.SHARES)
def test_all_ways_to_cut_keep_the_share(share: float) -> None:
    wanted = real_model_cuts.sizes(SMOLLM2, OUTSIDE, share)
    width = OUTSIDE - 3 * 576 * 30 * (1536 - wanted.intermediate_size)
    assert width / OUTSIDE == pytest.approx(share, abs=0.016)
    assert share <= wanted.num_hidden_layers / 30 < share + 1 / 30
    assert wanted.non_embedding_parameters == int(share * OUTSIDE)


def test_a_share_that_the_neurons_do_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no MLP neurons"):
        real_model_cuts.sizes(SMOLLM2, OUTSIDE, 0.2)


def test_contenders_are_ours_or_have_an_environment_and_an_attempt() -> None:
    assert {*real_model_cuts.CONTENDERS} <= {*real_model_cuts.OURS, *real_model_cuts.PEERS}
    assert real_model_peers.ATTEMPTS.keys() == real_model_cuts.PEERS.keys()
    assert {*real_model_cuts.PEERS.values()} == real_model_peers.PACKAGES.keys()
    assert all(real_model_peers.TORCH in packages for packages in real_model_peers.PACKAGES.values())


def test_a_changed_module_becomes_a_plain_model_of_the_new_sizes(tiny_folders: list[Path]) -> None:
    model = model_from(str(tiny_folders[0]), AutoModelForCausalLM, dtype="float32").eval()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            old = getattr(layer.mlp, name)
            old.weight = torch.nn.Parameter(old.weight[:40])
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight[:, :40])
    plain = real_model_peers.plain(model, real_model_peers.Asked("", "", intermediate_size=40, num_hidden_layers=2))
    ids = torch.arange(12).view(1, 12)
    assert plain.config.intermediate_size == 40
    torch.testing.assert_close(plain.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def of(perplexity: float) -> dict[str, Any]:
    return {
        "perplexity": perplexity,
        "kl_to_teacher": 1.0,
        "top1_agreement": 0.5,
        "parameters": 9,
        "non_embedding_parameters": 7,
    }


def test_models_are_compared_on_the_same_questions() -> None:
    right, wrong = [True] * 40, [False] * 40
    measured = [
        Measured("teacher", 1.0, None, of(10.0)),
        Measured("distill width", 0.72, None, of(30.0)),
        Measured("distill width", 0.72, 0, of(20.0)),
        Measured("soup shrink", 0.72, None, {}, outcome="KeyError: 'x'"),
        Measured("optipfair width", 0.72, 0, of(15.0)),
        Measured("teacher", 1.0, None, of(10.0), {"a": right, "b": right}),
        Measured("distill width", 0.72, 0, of(20.0), {"a": right, "b": wrong}),
        Measured("distill width", 0.72, 1, of(22.0), {"a": right, "b": right}),
        Measured("optipfair width", 0.72, 0, of(15.0), {"a": right, "b": right}),
    ]
    rows = real_model_rows.rows(measured)
    cut = [(row["contender"], row["perplexity"]) for row in rows if row["table"] == "cut"]
    assert cut == [("teacher", 10.0), ("distill width", 30.0)]
    assert [row["outcome"] for row in rows if row["table"] == "failed"] == ["KeyError: 'x'"]
    trained = [row for row in rows if row["table"] == "trained"]
    assert [(row["contender"], row["perplexity"]["values"]) for row in trained] == [
        ("optipfair width", [15.0]),
        ("distill width", [20.0, 22.0]),
    ]
    scores = {row["contender"]: (row["mean_accuracy"], row["seeds"]) for row in rows if row["table"] == "tasks"}
    assert scores == {"teacher": (1.0, 1), "optipfair width": (1.0, 1), "distill width": (0.75, 2)}
    pairs = {(row["first"], row["second"]): row for row in rows if row["table"] == "pairs"}
    assert pairs.keys() == {
        ("teacher", "distill width"),
        ("teacher", "optipfair width"),
        ("distill width", "optipfair width"),
    }
    assert pairs["teacher", "distill width"]["difference"] == -0.25
    assert pairs["teacher", "distill width"]["finding"] == "worse"
    assert pairs["teacher", "optipfair width"]["finding"] == "no difference shown"
    assert pairs["distill width", "optipfair width"]["finding"] == "better"
    (note,) = real_model_rows.missing(rows, [0.72], ["distill width", "soup shrink", "distill depth"])
    assert note == "Not trained yet: distill depth at 72 %."
    assert real_model_rows.missing(rows, [0.72], ["distill width", "soup shrink"]) == []


@pytest.fixture
def place(tmp_path: Path, tiny_folders: list[Path]) -> Path:
    """A model with a chat template, text and tasks, and an environment in which a library is missing."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer = tokenizer_from(str(tiny_folders[0]))
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "!"
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        file = data / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(file, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    sentence = "the old bridge was made of stone and only people on foot were allowed on it that year"
    words = sentence.split(" ")
    texts = [" ".join(words[k % 17 :] + words[: k % 17] + [str(k)]) * 2 for k in range(60)]
    write("books/train.jsonl.gz", [{"text": text} for text in texts])
    write("books/test.jsonl.gz", [{"text": f"another {text[::-1]}"} for text in texts[:20]])
    write("gsm8k/train.jsonl.gz", [{"question": f"What is {k} + 2?", "answer": f"It is {k + 2}."} for k in range(80)])
    write("instruct/a.jsonl.gz", [{"prompt": f"Name number {k}.", "response": f"It is {k}."} for k in range(80)])
    item = "Which of these two letters is the first letter of the alphabet, as children learn it at school?"
    write("mc/arc_easy.jsonl.gz", [{"query": f"{k}: {item}", "choices": ["a", "b"], "gold": k % 2} for k in range(9)])
    write("lambada/lambada_openai.jsonl.gz", [{"context": f"{k} {item}", "continuation": "a"} for k in range(9)])
    python = tmp_path / "environments" / "optipfair" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


@pytest.mark.exhaustive
def test_all_parts_are_measured_once_and_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_model_tasks, "TASKS", {k: real_model_tasks.TASKS[k] for k in ("arc_easy", "lambada")})
    monkeypatch.setattr(real_model_arms, "TASKS", real_model_tasks.TASKS)
    arguments = ["--model", f"{place}/model", "--data", f"{place}/data", "--work", f"{place}/work"]
    arguments += ["--cuts", "0.72", "--tokens", "512", "--seeds", "2", "--limit", "6", "--validation-tokens", "512"]
    arguments += ["--contenders", *real_model_cuts.OURS, "optipfair width"]
    arguments += ["--tasks", "arc_easy", "lambada", "--parts", "cuts", "criteria", "curve", "int4"]
    arguments += ["--curve", "256", "--environments", f"{place}/environments"]
    options = real_models.arguments().parse_args(arguments)
    options.text = {"sequence_length": 64, "calibration_sequences": 4}
    options.search = {
        "num_measured": 2,
        "num_sequences": 2,
        "multiple_of": {"hidden_size": 8, "intermediate_size": 8},
        "train": {"num_candidates": 2, "num_tokens": 128, "batch_size": 2},
    }
    rows = real_models.measure(options, place)
    assert json.loads((place / "real_models.json").read_text(encoding="utf-8"))["rows"] == rows
    (failed,) = [row for row in rows if row["table"] == "failed"]
    assert (failed["contender"], failed["outcome"]) == (
        "optipfair width",
        "ModuleNotFoundError: No module named 'optipfair'",
    )
    ours = {*real_model_cuts.OURS}
    cut = {row["contender"]: row for row in rows if row["table"] == "cut"}
    assert cut.keys() == {"teacher", *ours}
    assert all(
        0.6 < cut[name]["non_embedding_parameters"] / cut["teacher"]["non_embedding_parameters"] < 0.8 for name in ours
    )
    trained = {row["contender"]: row for row in rows if row["table"] == "trained"}
    assert trained.keys() == ours
    assert all(row["seeds"] == 2 and len({*row["perplexity"]["values"]}) == 2 for row in trained.values())
    assert all(trained[name]["kl_to_teacher"]["mean"] != cut[name]["kl_to_teacher"] for name in ours)
    asked = {row["contender"]: row["seeds"] for row in rows if row["table"] == "tasks"}
    assert asked == {"teacher": 1} | dict.fromkeys(ours, 2)
    assert len([row for row in rows if row["table"] == "pairs"]) == 9
    assert {row["criterion"] for row in rows if row["table"] == "criteria"} == {*real_model_cuts.CRITERIA}
    assert [row["learns_from"] for row in rows if row["table"] == "curve"] == ["the uncut model", "the text alone"]
    assert [row["way"] for row in rows if row["table"] == "int4"] == ["rounded", "trained by distillation"]
    capsys.readouterr()
    assert real_models.measure(options, place) == rows
    assert "perplexity" not in capsys.readouterr().out  # nothing was measured again
    options.only_finished, options.seeds = True, 3
    assert real_models.measure(options, place) == rows  # the third seed is not finished, and not begun
    options.parts = ["curve"]  # the rows of other parts stay
    assert [row["table"] for row in real_models.measure(options, place)] == [
        *(row["table"] for row in rows if row["table"] != "curve"),
        *(["curve"] * 2),
    ]
    assert "optipfair width | ModuleNotFoundError" in tables.render(place)
    assert "SmolLM2-135M-Instruct, cut and distilled" in tables.render_results(place)
