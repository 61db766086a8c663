"""Losses on inner states in whole runs: mapped by the pruning's plan, learned, taken up again, refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from distill.core.artifact import Artifact, Lineage
from distill.core.errors import InputError, RecipeError
from distill.core.run_folder import Run
from distill.forecast import describe
from distill.pruning.origin import Origin
from distill.recipe import Recipe
from distill.runner import run
from distill.stages.layer_origins import origin_of

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
  calibration_sequences: 4
stages:
  corrected: {{kind: finetune, model: teacher, num_steps: 1, batch_size: 2}}
  prune: {{model: corrected, keep: {{hidden_size: 24, num_hidden_layers: 2, intermediate_size: 32}}}}
  student:
    kind: distill
    student: prune
    teacher: corrected
    num_steps: 4
    batch_size: 4
    optimizer: {{lr: 5e-3, warmup_steps: 0}}
    losses: [forward_kl, {{kind: hidden_mse, weight: 0.5}}, attention_relation]
compute: {{accelerator: cpu, log_every_steps: 1, checkpoint_every_steps: 2}}
logging: {{wandb: disabled}}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"row {i} of the text that a small model reads, and {i * i} more words"} for i in range(80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from distill.data.tokenizer import train_tokenizer
    from distill.models.load import new_config, new_model

    folder = tmp_path_factory.mktemp("teacher") / "model"
    tokenizer = train_tokenizer(["row of the text that a small model reads, and more words"] * 5, 270, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    keys = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3}
    new_model(new_config(keys | sizes | {"vocab_size": len(tokenizer)}), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(teacher: Path, text: Path) -> Any:
    def make(*set: str) -> Recipe:
        return Recipe.from_text(RECIPE.format(teacher=teacher, text=text), set=set)

    return make


def quiet(line: str) -> None:
    pass


def test_a_pruned_student_learns_from_what_it_was_cut_out_of(recipe: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    said: list[str] = []
    folder = run(recipe(), tmp_path / "run", say=said.append).folder
    plan = json.loads((folder / "prune" / "plan.json").read_text())
    pairs = ", ".join(f"{i} <- {j}" for i, j in enumerate(plan["layers"]))
    assert f"  hidden_mse: layers of the student <- teacher: {pairs}" in said
    assert f"  attention_relation: layers of the student <- teacher: 1 <- {plan['layers'][1]}" in said
    assert "  hidden states are compared in the 24 of 32 channels that were kept" in said
    rows = [json.loads(line) for line in (folder / "student" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/kl" in row]
    assert all({"train/hidden_mse", "train/attention_relation", "train/forward_kl"} <= set(row) for row in trained)
    assert trained[-1]["train/hidden_mse"] < trained[0]["train/hidden_mse"]
    models = [
        AutoModelForCausalLM.from_pretrained(folder / stage / "model", output_loading_info=True)
        for stage in ("prune", "student")
    ]
    for _, report in models:
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    assert models[0][0].state_dict().keys() == models[1][0].state_dict().keys()


def test_a_learned_map_goes_on_where_it_was_and_stays_behind(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that breaks off after the first checkpoint ends in the very student of one that did not."""
    from distill.training.module import DistillationModule

    learned = recipe("stages.student.losses.1.projection=learned")
    said: list[str] = []
    straight = run(learned, tmp_path / "straight", say=said.append).folder
    assert any("24 -> 32 channels through a linear map that is trained and then removed" in line for line in said)

    step = DistillationModule.training_step

    def pulled(module: Any, batch: Any, index: int) -> Any:
        if module.trainer.global_step == 3:
            raise KeyError("plug")
        return step(module, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(DistillationModule, "training_step", pulled)
        with pytest.raises(KeyError):
            run(learned, tmp_path / "resumed", say=quiet)
    said.clear()
    resumed = run(learned, tmp_path / "resumed", say=said.append).folder
    assert any("resuming from step 2 of 4" in line for line in said)
    files = [folder / "student" / "model" / "model.safetensors" for folder in (straight, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ("[hidden_mse]", "hidden_mse does not train the output head; add a loss on logits, such as forward_kl"),
        ("[forward_kl, {kind: hidden_mse, layers: first}]", "layers: needs auto, last, or pairs such as"),
        ("[forward_kl, {kind: hidden_mse, layers: [[0, -1]]}]", "layers: needs auto, last, or pairs such as"),
        ("[forward_kl, {kind: hidden_cosine, projection: none}]", "projection"),
    ],
)
def test_a_mistake_is_one_line(losses: str, says: str, recipe: Any) -> None:
    with pytest.raises(RecipeError) as raised:
        recipe(f"stages.student.losses={losses}")
    (line,) = str(raised.value).splitlines()
    assert says in line


@pytest.mark.parametrize("codec", ["top_k", "hidden"])
def test_a_cache_is_refused_by_name(codec: str, recipe: Any, teacher: Path, text: Path) -> None:
    cached = RECIPE.replace("teacher: corrected", "teacher: cache").replace(
        "  student:\n", f"  cache: {{{{kind: cache_teacher, teacher: corrected, codec: {codec}}}}}\n  student:\n"
    )
    with pytest.raises(
        RecipeError, match=r"hidden_mse reads the teacher's hidden layers, and a cache stores only its output"
    ):
        Recipe.from_text(cached.format(teacher=teacher, text=text))


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        ("{kind: hidden_mse, layers: [[2, 1]]}", "hidden_mse.layers: the student has no layer 2"),
        ("{kind: hidden_cosine, layers: [[1, 3]]}", "hidden_cosine.layers: the teacher has no layer 3"),
        ("{kind: attention_relation, num_relation_heads: 5}", "must divide the student's 32 channels"),
    ],
)
def test_what_the_models_cannot_serve_is_said_before_the_run(loss: str, says: str, recipe: Any, tmp_path: Path) -> None:
    wrong = recipe(f"stages.student.losses=[forward_kl, {loss}]")
    with pytest.raises(RecipeError) as raised:
        describe(wrong)
    assert says in str(raised.value)
    with pytest.raises(InputError) as found:
        run(wrong, tmp_path / "run", say=quiet)
    assert says in str(found.value)


class Models:
    """Stands for a session: finished stages of a run, and any other place."""

    def __init__(self, run: Path, stages: list[str], teacher: str):
        self.run, self.stages, self.teacher = Run(run), stages, teacher
        for stage in stages:
            self.run.finish(stage, "hash", 0.0, {})

    def teacher_behind(self, reference: str) -> str:
        return reference  # no stage is a cache

    def artifact(self, reference: str) -> Artifact:
        if reference in self.stages:
            return self.run.model(reference)
        return Artifact(reference, self.teacher if reference == "teacher" else reference)


def _stage(run: Path, name: str, kind: str, parent: str, plan: Origin | None = None, root: str = "who/model") -> None:
    folder = run / name / "model"
    folder.mkdir(parents=True)
    lineage = Lineage(name, kind, parent, None, root, None, "hash")
    (folder / "distill.json").write_text(json.dumps(asdict(lineage)))
    if plan is not None:
        (folder.parent / "plan.json").write_text(json.dumps(asdict(plan)))


def test_the_origin_follows_the_lineages(tmp_path: Path) -> None:
    first, second = Origin((0, 2, 3), (1, 4, 5)), Origin((0, 2), (0, 2))
    _stage(tmp_path, "corrected", "finetune", "teacher")
    _stage(tmp_path, "first", "prune", "corrected", first)
    _stage(tmp_path, "middle", "distill", "first")
    _stage(tmp_path, "second", "prune", "middle", second)
    _stage(tmp_path, "last", "distill", "second")
    _stage(tmp_path, "apart", "prune", "other/model", first)
    stages = ["corrected", "first", "middle", "second", "last", "apart"]
    session: Any = Models(tmp_path, stages, "who/model")
    assert origin_of(session, "first", "corrected") == first
    assert origin_of(session, "first", "teacher") == first
    assert origin_of(session, "middle", "teacher") == first
    assert origin_of(session, "second", "middle") == second
    assert origin_of(session, "second", "first") == second
    assert origin_of(session, "last", "corrected") == Origin((0, 3), (1, 5))
    assert origin_of(session, "corrected", "teacher") is None  # nothing was cut
    assert origin_of(session, "first", "middle") is None
    assert origin_of(session, "apart", "teacher") is None
    assert origin_of(session, "corrected", "first") is None
    assert origin_of(session, "other/model", "teacher") is None
    # models of another run, named by their folders
    elsewhere: Any = Models(tmp_path / "elsewhere", [], "who/model")
    folder = str(tmp_path / "last" / "model")
    assert origin_of(elsewhere, folder, "teacher") == Origin((0, 3), (1, 5))
    assert origin_of(elsewhere, folder, str(tmp_path / "middle" / "model")) == second
    (tmp_path / "second" / "plan.json").unlink()
    with pytest.raises(InputError, match=r"plan.json: "):
        origin_of(session, "last", "teacher")
    assert origin_of(elsewhere, folder, "teacher") is None
