"""The forecast of memory: as much as is measured, shared out, and what to change when it does not fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from benchmarks import forecast
from distill.core.errors import RecipeError
from distill.forecast import describe, memory_limit
from distill.forecast.memory import MemoryModel
from distill.models.configs import config_of, count
from distill.models.lora import LoraSpec
from distill.recipe import Recipe
from distill.recipes import find
from distill.stages.prune import Prune

RECIPE = """\
name: large
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 1024
  tokenizer: teacher
stages:
  distill: {{student: {teacher}, num_steps: 2, batch_size: 8{more}}}
compute: {{accelerator: gpu{compute}}}
"""


@pytest.fixture
def plain() -> MemoryModel:
    return forecast.memory_model_of("tiny", rows=2, length=64, on_cpu=True)


@pytest.mark.parametrize("way", ["two micro-batches", "gradient checkpointing", "bf16-mixed"])
def test_as_much_as_is_measured(plain: MemoryModel, way: str) -> None:
    model = replace(plain, **forecast.WAYS[way])
    memory, peak = model.memory(), forecast.measured(model, "cpu")
    assert memory.total == pytest.approx(peak, rel=0.03)
    fixed = memory.student + memory.gradients + memory.optimizer + memory.teacher
    assert memory.total - fixed == pytest.approx(peak - fixed, rel=0.04)


def test_what_is_shared_out_and_what_is_not(plain: MemoryModel) -> None:
    alone, shared = plain.memory(), replace(plain, num_processes=4, sharded=True).memory()
    for name in ("student", "gradients", "optimizer", "teacher"):
        assert getattr(shared, name) == getattr(alone, name) / 4
    assert shared.activations == alone.activations
    assert shared.workspace > alone.workspace  # heads and a block are whole
    assert replace(plain, num_processes=4).memory().student == alone.student


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, Path]:
    """The config of a 7B Llama and some text."""
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "dtype": "bfloat16"}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.jsonl").write_text('{"text": "some"}\n')
    return folder, tmp_path / "text.jsonl"


@pytest.mark.parametrize(
    ("gigabytes", "more", "compute", "advice"),
    [
        (1000, "", "", None),
        (180, "", "", "compute.micro_batch_size: 4 would need "),
        (131, "", ", micro_batch_size: 1", "compute.gradient_checkpointing: true would need "),
        (
            60,
            "",
            "",
            "compute.gradient_checkpointing: true, compute.micro_batch_size: 1, "
            "compute.strategy: fsdp with 4 GPUs (compute.devices x num_nodes) would need ",
        ),
        (30, ", lora: {r: 8}", "", "compute.strategy: fsdp with 2 GPUs (compute.devices x num_nodes) would need "),
        (2, "", "", "no setting of compute is enough; train adapters"),
    ],
)
def test_what_to_change_when_it_does_not_fit(
    large: tuple[Path, Path], gigabytes: float, more: str, compute: str, advice: str | None
) -> None:
    recipe = Recipe.from_text(RECIPE.format(teacher=large[0], text=large[1], more=more, compute=compute))
    plan = describe(recipe, gigabytes)
    memory = next(line for line in plan.splitlines() if "memory of a GPU: " in line)
    total, *parts = [float(number) for number in re.findall(r"([\d.,]+) GB", memory.replace(",", ""))]
    assert sum(parts) == pytest.approx(total, abs=1)
    assert "teacher 13.5 GB" in memory
    assert ("does not fit into" in plan) == (advice is not None) == (total > gigabytes)
    assert advice is None or advice in plan


def test_a_gpu_of_the_teachers_own_is_none_that_shares(large: tuple[Path, Path]) -> None:
    def advice(compute: str) -> str:
        text = RECIPE.format(teacher=large[0], text=large[1], more="", compute=compute)
        return describe(Recipe.from_text(text), 80).split("does not fit into 80.0 GB: ")[1].splitlines()[0]

    need = r"compute.strategy: fsdp with 2 GPUs .* would need ([\d.]+) GB"
    alone, beside = advice(", micro_batch_size: 1, teacher_device: 'cuda:1'"), advice(", micro_batch_size: 1")
    assert "compute.teacher_device: auto, compute.strategy: fsdp" in alone
    assert re.findall(need, alone) == re.findall(need, beside) != []


def test_a_cached_teachers_body_is_nowhere(large: tuple[Path, Path]) -> None:
    """Wherever its head may be: no advice counts the body."""
    cache = "  cache: {{kind: cache_teacher, teacher: {teacher}, codec: hidden}}\n  distill: {{teacher: cache, "
    recipe = RECIPE.replace("  distill: {{", cache)

    def advice(compute: str) -> list[str]:
        text = recipe.format(teacher=large[0], text=large[1], more="", compute=", micro_batch_size: 1" + compute)
        return re.findall(r"with \d GPUs .* would need [\d.]+ GB", describe(Recipe.from_text(text), 80))

    assert advice("") == advice(", teacher_device: 'cuda:1'") != []


def test_what_is_not_known_is_said(large: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = RECIPE.replace("teacher: {teacher}", "teacher: somebody/elsewhere", 1).replace("tokenizer: teacher", "")
    plan = describe(Recipe.from_text(elsewhere.format(teacher=large[0], text=large[1], more="", compute="")), 1000)
    assert "+ the teacher, whose config is not on this machine" in plan
    assert "compute.devices: auto is counted as one GPU per machine" in plan
    alone = Recipe.from_text(RECIPE.format(teacher=large[0], text=large[1], more="", compute=", strategy: fsdp"))
    monkeypatch.setattr(memory_limit, "_gpus", lambda: [80e9] * 4)
    shared = next(line for line in describe(alone).splitlines() if "memory of a GPU: " in line)
    assert "student 6.7 GB" in shared
    assert "the first process reads the models into 40.4 GB of its machine's own memory" in describe(alone)
    assert "counted as one" not in describe(alone)


def test_more_processes_are_no_help_on_a_cpu(large: tuple[Path, Path]) -> None:
    text = RECIPE.replace("accelerator: gpu", "accelerator: cpu")
    plan = describe(Recipe.from_text(text.format(teacher=large[0], text=large[1], more="", compute="")), 60)
    assert "does not fit into" in plan
    assert "fsdp" not in plan


def test_a_checkpoint_that_is_written_behind_is_one_more_copy(large: tuple[Path, Path]) -> None:
    text = RECIPE.format(teacher=large[0], text=large[1], more="", compute=", write_checkpoints: behind")
    assert "a checkpoint is 80.9 GB, up to 3 on disk at a time, and a copy in the machine's own memory" in describe(
        Recipe.from_text(text), 1000
    )
    on_cpu = text.replace("accelerator: gpu", "accelerator: cpu")
    at_once = room_for(describe(Recipe.from_text(on_cpu.replace(", write_checkpoints: behind", "")), 1000))
    assert room_for(describe(Recipe.from_text(on_cpu), 1000)) == pytest.approx(at_once + 80.9, abs=0.2)
    assert "compute.write_checkpoints: at_once would need" in describe(Recipe.from_text(on_cpu), at_once + 1)


def room_for(plan: str) -> float:
    found = re.search(r"memory of .*: ([\d.,]+) GB = ", plan)
    assert found is not None
    return float(found[1].replace(",", ""))


def test_adapters_are_counted_where_they_are(plain: MemoryModel) -> None:
    def trained(targets: str | tuple[str, ...]) -> int:
        return replace(plain, lora=LoraSpec(r=4, target_modules=targets)).trained()

    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert trained("all-linear") == trained(parts) == sum(trained((part,)) for part in parts)
    assert trained(r".*\.q_proj") == trained(("self_attn.q_proj",)) == trained(("q_proj",)) > 0


def test_tokens_a_step_and_checkpoints(large: tuple[Path, Path]) -> None:
    recipe = Recipe.from_text(
        RECIPE.format(teacher=large[0], text=large[1], more="", compute=", micro_batch_size: 2, keep_checkpoints: 1")
    )
    # fp32 weights and two moments of 6.74B parameters
    line = "8,192 tokens per step, 2 x 1,024 at once; a checkpoint is 80.9 GB, up to 2 on disk at a time"
    assert line in describe(recipe, 80)


SEARCHED = """\
name: searched
teacher: {teacher}
data: {{train: {{kind: jsonl, path: {text}}}, sequence_length: 1024, tokenizer: teacher}}
stages:
  prune: {{search: {{budget: {{parameters: 60%}}, axes: [intermediate_size, num_hidden_layers]}}}}
  again: {{kind: prune, model: prune, keep: {{intermediate_size: 1024}}}}
"""


def test_what_follows_a_search_is_told_of_the_largest_that_it_may_be(large: tuple[Path, Path]) -> None:
    """The candidate of most parameters is not that of most once the neurons of all are cut to one number."""
    teacher, text = large
    recipe = Recipe.from_text(SEARCHED.format(teacher=teacher, text=text))
    config, prune = config_of(str(teacher)), recipe.stages["prune"]
    assert config is not None
    assert isinstance(prune, Prune)
    layers = [found.sizes["layers"] for found in prune.candidates(config, 1024)]
    cut = [count({**config, "num_hidden_layers": number, "intermediate_size": 1024}) or 0 for number in layers]
    (told,) = re.findall(r"keeps intermediate_size 1024; makes at most ([\d.]+)B", describe(recipe))
    assert told == f"{max(cut) / 1e9:.2f}" != f"{cut[0] / 1e9:.2f}"


def test_a_stage_after_a_search_is_held_against_every_model_that_it_may_find(large: tuple[Path, Path]) -> None:
    """Only where none of them fits it is refused; the others are counted and the reason of the first is told."""
    teacher, text = large
    grid = "\n  low: {{kind: quantize, student: prune, num_tokens: 0, quantizer: {{kind: int_group, group_size: {}}}}}"
    steps = "multiple_of: {{intermediate_size: 8}}, axes"

    def plan(group_size: int) -> str:
        recipe = SEARCHED.replace("axes", steps).format(teacher=teacher, text=text) + grid.format(group_size)
        return describe(Recipe.from_text(recipe))

    (few, many) = re.findall(r"ends here for (\d+) of the (\d+) models that may come: .*in_features", plan(64))[0]
    assert 0 < int(few) < int(many)
    assert "makes at most" in plan(8).split("low (quantize)")[1]
    assert "ends here" not in plan(8)
    with pytest.raises(RecipeError, match=r"stages\.low: .*in_features"):
        plan(24)


@pytest.mark.parametrize(
    "sizes",
    [
        "keep: {{intermediate_size: 16}}",
        "search: {{budget: {{parameters: 72%}}, axes: [intermediate_size], multiple_of: {{intermediate_size: 8}}}}",
    ],
)
def test_a_criterion_that_knows_no_experts_is_refused_before_it_scores(sizes: str, tmp_path: Path) -> None:
    from transformers import MixtralConfig

    MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=100,
    ).save_pretrained(tmp_path)  # fmt: skip
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')

    def plan(more: str) -> str:
        stage = f"  prune: {{{{{sizes}{more}}}}}\n"
        return describe(
            Recipe.from_text((SEARCHED.partition("  prune:")[0] + stage).format(teacher=tmp_path, text=text))
        )

    assert "makes" in plan("")
    for more in (", criterion: wanda", ", mlp_criterion: {{kind: taylor}}"):
        with pytest.raises(RecipeError, match=r"does not score the neurons of experts; choose one of activation, "):
            plan(more)


def test_what_follows_an_unsettled_size_is_unsettled(large: tuple[Path, Path]) -> None:
    teacher, text = large
    cut = "{{kind: prune, keep: {{vocabulary: used}}}}\n  low: {{kind: quantize, student: prune, num_tokens: 0}}\n"
    recipe = SEARCHED.partition("  prune:")[0] + "  prune: " + cut
    told = describe(Recipe.from_text(recipe.format(teacher=teacher, text=text)))
    assert told.count("makes at most") == 2


def test_the_short_trainings_of_a_search_are_forecast_as_those_of_one_process() -> None:
    """They have the student, the batch and the teacher of the distillation after them."""

    def memory(*overrides: str) -> list[str]:
        recipe = Recipe.load(find("budget-search"), ["compute.accelerator=gpu", *overrides])
        return re.findall(r"^ +(.*(?:memory of|does not fit).*)$", describe(recipe, 0.07), re.MULTILINE)

    of = "of a short training: "
    short, no_short, after, no_after, *_ = memory()
    assert (short, no_short) == (of + after, of + no_after)
    shared = memory("compute.devices=2", "compute.strategy=fsdp")
    assert shared[0] == short
    assert shared[2] != after
    only_shared = ("compute.micro_batch_size=1", "compute.gradient_checkpointing=true", "compute.teacher_device=cpu")
    assert not any("fsdp" in line for line in memory(*only_shared) if line.startswith(of))
    with pytest.raises(RecipeError, match=r"stages\.prune: batch_size \(8\) must be a multiple of compute\.micro"):
        describe(Recipe.load(find("budget-search"), ["compute.micro_batch_size=3"]))


@pytest.mark.parametrize(("batch_size", "micro"), [(1_000_000_000, 20), (2**31 - 1, 1), (2**30, 16)])
def test_a_batch_of_any_size_is_split(large: tuple[Path, Path], batch_size: int, micro: int) -> None:
    """Not by trying every number below it; the second is a prime."""
    text = RECIPE.format(teacher=large[0], text=large[1], more="", compute="")
    plan = describe(Recipe.from_text(text, set=[f"stages.distill.batch_size={batch_size}"]), memory_gb=300)
    assert f"does not fit into 300.0 GB: compute.micro_batch_size: {micro} would need" in plan


def test_the_ways_to_split_a_batch() -> None:
    for number in range(1, 200):
        assert memory_limit._divisors(number) == [size for size in range(number, 0, -1) if number % size == 0]


@pytest.mark.parametrize("batch_size", ["2147483648", "0x" + "f" * 60, "1e400", "1" + "0" * 400])
def test_a_batch_of_no_size_is_refused(large: tuple[Path, Path], batch_size: str) -> None:
    text = RECIPE.format(teacher=large[0], text=large[1], more="", compute="")
    line = r"stages.distill.batch_size: .*(at most 2147483647|2\*\*63|finite|whole number of 401 digits)"
    with pytest.raises(RecipeError, match=line):
        Recipe.from_text(text, set=[f"stages.distill.batch_size={batch_size}"])


NEW = """\
name: new
data:
  train: {kind: jsonl, path: TEXT}
  sequence_length: 16
  tokenizer: TOKENIZER
stages:
  new: {kind: finetune, num_steps: 2, model: {config: {model_type: llama, hidden_size: 64, intermediate_size: 128,
    num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 32}}}
  prune: {model: new, CUT}
  distill: {student: prune, teacher: new, num_steps: 2}
"""


@pytest.mark.parametrize("cut", ["keep: {intermediate_size: 32}", "search: {budget: {parameters: 70%}}"])
@pytest.mark.parametrize(
    ("tokenizer", "makes"),
    [
        ("{vocab_size: 300}", "0.19M parameters"),  # 148,032 and two tables of 300 x 64
        ("builtin:quickstart-teacher", "0.41M parameters"),
        ("some/model", None),
    ],
)
def test_a_new_model_gets_its_vocabulary_from_the_tokenizer(
    large: tuple[Path, Path], cut: str, tokenizer: str, makes: str | None
) -> None:
    """At most so many tokens as that can have; where nobody knows, its size is not known either."""
    text = NEW.replace("TEXT", str(large[1])).replace("TOKENIZER", tokenizer).replace("CUT", cut)
    lines = describe(Recipe.from_text(text)).splitlines()
    made = [line for line in lines if "; makes " in line]
    assert len(made) == 3
    if makes is None:
        assert all("makes a model of unknown size" in line for line in made)
    else:
        assert made[0].endswith(f"makes at most {makes}")
        assert all("makes at most " in line for line in made)
    assert "search" not in cut or "(the model's tokens are not counted yet)" in made[1]
    longer = text.replace("sequence_length: 16", "sequence_length: 64")
    with pytest.raises(RecipeError, match="is longer than the model's 32 positions"):
        describe(Recipe.from_text(longer))


def test_check_names_what_rows_begin_with_and_texts_that_look_like_chats(large: tuple[Path, Path]) -> None:
    folder, text = large
    backend = Tokenizer(WordLevel({"a": 0, "<bos>": 1, "<pad>": 2}, unk_token="a"))
    backend.add_special_tokens(["<bos>", "<pad>"])
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    rows = ["plain", "a <pad> in it", "<|im_start|>user\nHello<|im_end|>", *["more"] * 600]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    recipe = RECIPE.format(teacher=folder, text=text, more="", compute="")
    said = describe(Recipe.from_text(recipe), 1000)
    assert "    each row begins with '<bos>', which the tokenizer puts before a text" in said
    found = [line for line in said.splitlines() if "data.train: 1 documents" in line]
    assert len(found) == 2
    assert all(line.endswith("looked at the first 500") for line in found)
    assert f"written out, read as plain text: they end and mark nothing (first {text}:2)" in said
    assert f"if they are, use kind: chat (first {text}:3)" in said
    of_its_own = recipe.replace("tokenizer: teacher", "tokenizer: {vocab_size: 300}")
    # the run makes that one, and it puts nothing there
    assert "row begins with" not in describe(Recipe.from_text(of_its_own), 1000)
