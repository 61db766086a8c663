"""The command line: every verb, every exit code, and one clear line for every mistake of a user."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill import __version__
from distill.core.run_folder import Run
from distill.core.sweep import trial_of_sweep

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
  calibration_sequences: 4
stages:
  prune:
    keep: {{intermediate_size: 32}}
  distill:
    student: prune
    num_steps: 1
    batch_size: 2
  quantize:
    student: distill
    num_tokens: 0
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


@dataclass(frozen=True)
class Result:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


Distill = Callable[..., Result]


@pytest.fixture
def distill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Distill:
    """The command line in this process, in a folder of its own; nothing that it says is ever a traceback."""
    from distill.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["distill", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(int(caught.value.code or 0), out, err)

    return call


def text_file(file: Path, rows: int) -> Path:
    file.write_text(
        "".join(json.dumps({"text": f"row {i} of the text that a small model reads"}) + "\n" for i in range(rows))
    )
    return file


def make_model(folder: Path, words: str) -> Path:
    """A tiny llama with random weights whose tokenizer was trained on ``words``."""
    from distill.data.tokenizer import train_tokenizer
    from distill.models.load import new_config, new_model

    tokenizer = train_tokenizer([words] * 5, 270, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys = {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "vocab_size": len(tokenizer),
    }
    new_model(new_config(keys | sizes), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher") / "model", "row of the text that a small model reads")


@pytest.fixture
def recipe(tmp_path: Path, teacher: Path) -> Path:
    """A recipe that runs in a second or two."""
    text = text_file(tmp_path / "text.jsonl", 60)
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(teacher=teacher, text=text))
    return tmp_path / "tiny.yaml"


def edited(recipe: Path, *pairs: tuple[str, str]) -> Path:
    text = recipe.read_text()
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    recipe.write_text(text)
    return recipe


# ---------------------------------------------------------------------------------------------- verbs that are quick


def test_what_is_quick_imports_nothing_heavy(recipe: Path, tmp_path: Path) -> None:
    commands = [["--help"], ["--version"], ["run", "--help"], ["list"], ["list", "losses"], ["check", str(recipe)]]
    commands += [["schema"], ["schema", str(tmp_path / "s.json")], ["check", "no-such-recipe"], ["rnu"]]
    code = (
        "import json, sys\n"
        "from distill.cli import main\n"
        "codes = []\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['distill', *command]\n"
        "    try: main()\n"
        "    except SystemExit as exit_: codes.append(exit_.code)\n"
        "heavy = 'torch transformers datasets pytorch_lightning peft wandb matplotlib'.split()\n"
        "print(json.dumps([codes, [name for name in heavy if name in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[0] * 8 + [2, 2], []]


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "distill", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"distill {__version__}\n")


def test_help_names_every_verb(distill: Distill) -> None:
    result = distill("--help")
    verbs = ("run", "resume", "check", "list", "report", "compare", "schema", "cache", "doctor")
    verbs += ("prune", "quantize", "evaluate", "export")
    assert [v for v in verbs if v not in result.out] == []
    assert distill().code == 2


def test_list_shows_members_with_their_fields(distill: Distill) -> None:
    everything = distill("list").out
    assert [
        w for w in ("quickstart", "forward_kl", "int_group", "group_size", "activation", "hub") if w not in everything
    ] == []
    assert "int_group" not in distill("list", "losses").out
    result = distill("list", "loses")
    assert (result.code, result.out) == (2, "")
    assert "did you mean 'losses'?" in result.err


def test_list_shows_the_keys_of_a_section(distill: Distill) -> None:
    for section, key in (("keep", "head_choice"), ("optimizer", "betas"), ("lora", "alpha"), ("data", "packing")):
        first, *keys = distill("list", section).out.splitlines()
        assert first.startswith(f"{section}: ")
        heads = [line for line in keys if line.startswith("      ") and line[6] != " "]
        assert all(len(line.split()) > 2 for line in heads), "a default and a word about it"
        assert key in [line.split()[0] for line in heads]
    assert "smallest_share" in distill("list").out


def test_list_shows_choices_and_fits_the_terminal(distill: Distill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert max(map(len, distill("list").out.splitlines())) <= 110
    assert "Choices: cosine, linear, constant." in " ".join(distill("list", "optimizer").out.split())
    losses = distill("list", "losses").out
    assert losses.count(" weight ") == 1  # every loss has it, so it stands once
    assert losses.index("each of these loss entries also takes") < losses.index(" weight ")


def test_init_writes_a_recipe_that_checks(distill: Distill, tmp_path: Path) -> None:
    assert (
        distill("init").out
        == "recipe.yaml: written. Edit it, then: distill check recipe.yaml, distill run recipe.yaml\n"
    )
    assert (tmp_path / "recipe.yaml").read_text().startswith("# distill run recipe.yaml\n")
    assert distill("check", "recipe.yaml").code == 0
    assert distill("init", "quickstart", "--out", "mine/q.yaml").code == 0
    assert distill("check", "mine/q.yaml").code == 0
    before = (tmp_path / "recipe.yaml").read_text()
    again = distill("init")
    assert (again.code, again.err) == (2, "recipe.yaml: is there already; name another with --out, or remove it\n")
    assert (tmp_path / "recipe.yaml").read_text() == before
    wrong = distill("init", "quickstrat")
    assert wrong.code == 2
    assert "did you mean 'quickstart'?" in wrong.err


def test_list_recipes_says_what_each_makes(distill: Distill) -> None:
    lines = distill("list", "recipes").out.splitlines()[1:]
    starts = [i for i, line in enumerate(lines) if line[2] != " "]
    assert len(starts) >= 8
    assert all(lines[i - 1].endswith(".") for i in [*starts[1:], len(lines)])


def test_schema_to_a_file_is_what_is_printed(distill: Distill, tmp_path: Path) -> None:
    assert distill("schema", tmp_path / "schema.json").code == 0
    assert (tmp_path / "schema.json").read_text() == distill("schema").out


def test_check_prints_the_plan(distill: Distill, recipe: Path) -> None:
    result = distill("check", recipe, "--set", "stages.distill.num_steps=7")
    assert result.code == 0
    assert "[2/3] distill: reads prune, teacher; 224 tokens = 7 steps of 2 x 16;" in result.out
    assert "keeps intermediate_size 32" in result.out
    assert "5% held out, at most 100 tokens of it to validate on" in result.out


def test_check_compares_the_memory_with_that_of_another_machine(distill: Distill) -> None:
    for gigabytes, is_enough in (("0.01", False), ("80", True)):
        result = distill("check", "quickstart", "--memory", gigabytes)
        assert result.code == 0
        assert "memory of a GPU: " in result.out
        assert ("does not fit into 10.0 MB: " in result.out) is not is_enough


def test_check_downloads_nothing(distill: Distill, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert distill("check", "smollm2-1.7b-to-1b", "--set", "teacher=nobody/has-this-model").code == 0


def test_check_finds_a_size_that_the_teacher_does_not_have(distill: Distill, recipe: Path) -> None:
    result = distill("check", recipe, "--set", "stages.prune.keep.intermediate_size=65")
    assert result.code == 2
    assert "keep.intermediate_size (65) is more than the model has (expected 1 to 64)" in result.err


# ----------------------------------------------------------------------------------------- mistakes in the recipe


def test_no_such_recipe(distill: Distill) -> None:
    for verb in ("run", "check"):
        result = distill(verb, "quickstrat")
        assert result.code == 2
        assert result.err.startswith("quickstrat: no such recipe")
        assert "did you mean 'quickstart'?" in result.err


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("num_steps: 1", "num_stps: 1", 13, "stages.distill.num_stps: unknown key; did you mean 'num_steps'?"),
        ("num_steps: 1", "num_steps: one", 13, "stages.distill.num_steps: must be a whole number (got 'one')"),
        ("num_steps: 1", "num_steps: 1\n    num_steps: 2", 14, "stages.distill.num_steps: written twice"),
        ("num_steps: 1", "num_steps: 1\n    num_tokens: 2", 11, "stages.distill: give the budget once"),
        ("student: prune", "student: purne", 12, "no earlier stage, folder or Hub id 'purne'"),
        ("  prune:", "  prun:", 9, "stages.prun: no stage called 'prun'"),
        ("  prune:", "  data:\n    kind: prune", 9, "stages.data: 'data' cannot be the name of a stage"),
        (
            "  prune:",
            "  prune.half:\n    kind: prune",
            9,
            "stages.prune.half: 'prune.half' cannot be the name of a stage",
        ),
        (
            "{intermediate_size: 32}",
            "32",
            10,
            "or keep: {hidden_size: ...} (got 32)",
        ),
        ("name: tiny", "name: !!python/name:os.system x", 1, "not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(
    distill: Distill, recipe: Path, old: str, new: str, line: int, message: str
) -> None:
    edited(recipe, (old, new))
    for verb in ("check", "run"):
        result = distill(verb, recipe)
        assert (result.code, result.out) == (2, "")
        first, *rest = result.err.splitlines()
        assert first.startswith(f"{recipe}:{line}: ")
        assert message in first
        assert [line for line in rest if "'prune'" not in line] == []  # the stage that now lacks its student


def test_several_mistakes_come_at_once(distill: Distill, recipe: Path) -> None:
    edited(recipe, ("sequence_length: 16", "sequence_length: long"), ("batch_size: 2", "batch_sise: 2"))
    lines = distill("check", recipe, "--set", "seed=x").err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{recipe}:5", "--set seed", f"{recipe}:14"]


def test_arguments_that_do_not_exist(distill: Distill, recipe: Path) -> None:
    for arguments in (["rnu"], ["run"], ["run", str(recipe), "--onyl", "prune"], ["check", str(recipe), "--set"]):
        result = distill(*arguments)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert result.err.endswith(" --help)\n")


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            ["compute.devices=0"],
            ["--set compute.devices: must be 'auto' or at least 1 (got 0)"],
        ),
        (
            ["compute.teacher_device=gpu1"],
            ["--set compute.teacher_device: expected auto, cpu, cuda or one GPU, such as cuda:1 (got 'gpu1')"],
        ),
        (
            ["stages.prune.keep=3"],
            [
                "--set stages.prune.keep: needs a mapping of keys to values, such as keep: {} for its defaults, or "
                "keep: {hidden_size: ...} (got 3)"
            ],
        ),
        (
            ["stages.distill.num_tokens=9", "seed=3"],
            [
                "--set stages.distill.num_tokens: {file}:11: stages.distill: "
                "give the budget once: num_tokens, num_steps or num_epochs"
            ],
        ),
        (
            ["seed=3", "stages.distill.student=quantize"],
            ["--set stages.distill.student: 'quantize' must stand before this stage; move it up"],
        ),
        (
            ["stages.prune.model=a/b", "stages.distill.teacher=a/b", "seed=3", "data.tokenizer=a/b"],
            [
                "--set stages.prune.model, --set stages.distill.teacher, --set data.tokenizer: "
                "{file}:2: teacher: no stage uses it; remove it"
            ],
        ),
    ],
)
def test_a_mistake_of_set_is_blamed_on_set(
    distill: Distill, recipe: Path, changes: list[str], lines: list[str]
) -> None:
    result = distill("check", recipe, *(part for each in changes for part in ("--set", each)))
    assert (result.code, result.err.splitlines()) == (2, [line.replace("{file}", str(recipe)) for line in lines])


def test_a_mistake_of_the_file_is_not_blamed_on_set(distill: Distill, recipe: Path) -> None:
    edited(recipe, ("num_steps: 1", "num_steps: 1\n    num_tokens: 2"))
    result = distill("check", recipe, "--set", "seed=3", "--set", "stages.quantize.student=evaluate")
    assert result.err.splitlines()[0].startswith(f"{recipe}:11: stages.distill: give the budget once")


# ------------------------------------------------------------------------------------ mistakes that a run meets


def test_unknown_stage(distill: Distill, recipe: Path) -> None:
    for flag in ("--only", "--from"):
        result = distill("run", recipe, flag, "distil")
        assert result.code == 2
        assert result.err == f"{flag} distil: no such stage (stages: prune, distill, quantize)\n"


def test_only_and_from_exclude_each_other(distill: Distill, recipe: Path, tmp_path: Path) -> None:
    result = distill("run", recipe, "--only", "prune", "--from", "prune")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("--only prune and --from prune: ")
    assert not (tmp_path / "runs").exists()


def test_only_needs_what_stands_before(distill: Distill, recipe: Path) -> None:
    result = distill("run", recipe, "--only", "distill")
    assert result.code == 2
    assert "stage 'prune' before it is not finished" in result.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teacher=./no/such/folder", "./no/such/folder: no such folder"),
        ("teacher=.", "not a model folder (no config.json in it)"),
        ("teacher=builtin:quickstrat-teacher", "no such built-in model"),
        ("data.train.path=missing.jsonl", "missing.jsonl: no such file or folder"),
        ("data.train.path=empty.jsonl", "empty corpus"),
        ("data.train.text=body", "no column 'body'"),
        ("data.sequence_length=64", "longer than the model's 32 positions"),
        (
            "stages.quantize.quantizer={kind: int_group, group_size: 24}",
            "group_size (24) must divide in_features (32)",
        ),
        ("compute.micro_batch_size=3", None),
        ("stages.distill.batch_size=4", None),
        ("{both}", "batch_size (4) must be a multiple of compute.micro_batch_size (3)"),
        ("compute.accelerator=gpu", "no GPU"),
    ],
)
def test_what_is_wrong_with_the_users_things_is_one_line(
    distill: Distill, recipe: Path, tmp_path: Path, change: str, message: str | None
) -> None:
    import torch

    if change.endswith("=gpu") and torch.cuda.is_available():
        pytest.skip("this machine has one")
    (tmp_path / "empty.jsonl").write_text("")
    changes = ["compute.micro_batch_size=3", "stages.distill.batch_size=4"] if change == "{both}" else [change]
    result = distill("run", recipe, *(part for each in changes for part in ("--set", each)))
    if message is None:
        assert result.code == 0
        return
    assert result.code == (1 if "GPU" in message else 2)
    assert len(result.err.strip().splitlines()) == 1
    assert message in result.err


def test_a_model_that_is_not_on_the_hub_moves_nothing(
    distill: Distill, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(url: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", raises)
    (tmp_path / "runs/tiny/prune").mkdir(parents=True)
    (tmp_path / "runs/tiny/prune/INPUT").write_text("an earlier one\n")
    result = distill("run", recipe, "--set", "teacher=who/none")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(
        "who/none: no such folder, and the Hub cannot be reached; check the name and the network, or "
    )
    assert result.err.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "runs/tiny").iterdir() if path.name != ".lock") == ["prune"]


def test_teacher_and_student_of_two_vocabularies(distill: Distill, recipe: Path, tmp_path: Path) -> None:
    stranger = make_model(tmp_path / "stranger", "wholly other letters: zyx wvu tsr qpo")
    result = distill("run", recipe, "--set", f"stages.distill.teacher={stranger}")
    assert result.code == 2
    assert f"stages.distill.teacher: {stranger} has 270 tokens" in result.err
    assert "take models of one tokenizer" in result.err


def test_a_run_folder_in_use(distill: Distill, recipe: Path, tmp_path: Path) -> None:
    with Run(tmp_path / "mine").lock():
        result = distill("run", recipe, "--run-dir", tmp_path / "mine")
    assert result.code == 2
    assert "in use by process" in result.err
    assert "choose another --run-dir" in result.err


# ------------------------------------------------------------------------------------------------- runs that go well


def test_run_then_run_again_then_parts_of_it(distill: Distill, recipe: Path, tmp_path: Path) -> None:
    first = distill("run", recipe)
    assert first.code == 0, first.err
    folder = tmp_path / "runs" / "tiny"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "data",
        "distill",
        "prune",
        "quantize",
        "scores",
    ]

    assert (folder / "distill" / "metrics.csv").read_text().startswith("step,tokens,")

    assert distill("run", recipe).out.count("finished before") == 3
    assert distill("run", recipe, "--from", "distill").out.count("finished before") == 1
    assert distill("run", recipe, "--only", "distill").out.count("finished before") == 0
    # the quantized model was made from a student that is no longer there, so it is made anew, once
    assert distill("resume", folder).out.count("finished before") == 2
    assert distill("resume", folder).out.count("finished before") == 3
    machine = ["compute.num_workers=1", "compute.checkpoint_every_steps=7", "compute.micro_batch_size=1"]
    resumed = distill("resume", folder, *(word for setting in machine for word in ("--set", setting)))
    assert resumed.out.count("finished before") == 3, "no result depends on the machine's settings"

    changed = distill("run", recipe, "--set", "stages.distill.num_steps=2")
    assert changed.out.count("finished before") == 1
    assert (folder / "distill.old-1").is_dir()


NEW_MODEL = """\
name: new
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
  tokenizer: {{vocab_size: 270}}
stages:
  finetune:
    num_steps: 1
    batch_size: 2
    model:
      config:
        {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4}}
  evaluate: {{speed: null}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


@pytest.fixture
def new_model(tmp_path: Path) -> Path:
    """A recipe without a teacher."""
    (tmp_path / "new.yaml").write_text(NEW_MODEL.format(text=text_file(tmp_path / "text.jsonl", 60)))
    return tmp_path / "new.yaml"


def test_data_prints_the_rows_of_any_text(distill: Distill, recipe: Path, tmp_path: Path) -> None:
    done = distill("data", recipe, "--rows", "2")
    assert done.code == 0, done.err
    assert done.out.count(" of the text that a ") == 2
    assert done.out.count("\nrow ") == 2
    assert list((tmp_path / "runs" / "tiny" / "data").glob("train-*.bin"))
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"prompt": "row?", "response": "text"}\n' * 30)
    done = distill("data", recipe, "--set", f"data.train={{kind: chat, path: {chat}}}")
    assert done.code == 2
    assert done.out == ""
    assert "data.chat.template: the teacher (" in done.err
    assert ") has no chat template; take the student's, if it has one, or name a .jinja file\n" in done.err
    assert done.err.count("\n") == 1


def test_a_run_without_a_teacher(distill: Distill, new_model: Path) -> None:
    result = distill("run", new_model)
    assert result.code == 0, result.err


def test_a_budget_of_nothing_writes_the_model_untrained(distill: Distill, new_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from distill.models.load import load_config
    from distill.models.load import new_model as drawn

    edited(new_model, ("num_steps: 1", "num_tokens: 0"), ("    batch_size: 2\n", ""))
    assert distill("run", new_model).code == 0
    folder = tmp_path / "runs" / "new" / "finetune" / "model"
    expected = drawn(load_config(str(folder)), seed=0).state_dict()
    written = load_file(folder / "model.safetensors")
    assert all((written[name] == expected[name]).all() for name in written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("hidden_sise=3", "llama has no key 'hidden_sise'; did you mean 'hidden_size'?"),
        ("model_type=lama", "no model_type 'lama'; did you mean 'llama'?"),
        ("num_attention_heads=3", "not a multiple of the number of attention heads"),
        ("hidden_size=wide", "hidden_size is 'wide', expected a whole number"),
        ("vocab_size=100", "less than the tokenizer's 270 tokens"),
    ],
)
def test_a_config_that_transformers_refuses(distill: Distill, new_model: Path, change: str, message: str) -> None:
    result = distill("run", new_model, "--set", f"stages.finetune.model.config.{change}")
    assert result.code == 2
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_resume_changes_nothing_but_compute(distill: Distill, recipe: Path, tmp_path: Path) -> None:
    result = distill("resume", tmp_path)
    assert result.code == 2
    assert "not a run folder" in result.err
    (tmp_path / "recipe.yaml").write_text(recipe.read_text())
    result = distill("resume", tmp_path, "--set", "seed=1")
    assert result.code == 2
    assert "only compute may change on resume" in result.err


def test_report_and_compare_of_what_is_no_run(distill: Distill, tmp_path: Path) -> None:
    for arguments in (
        ["report", str(tmp_path)],
        ["compare", str(tmp_path), "--prompt", "x"],
        ["compare", str(tmp_path)],
    ):
        result = distill(*arguments)
        assert result.code == 2
        assert len(result.err.strip().splitlines()) == 1


def test_report_and_compare_of_runs(distill: Distill, recipe: Path, tmp_path: Path) -> None:
    edited(recipe, ("    num_tokens: 0\n", "    num_tokens: 0\n  evaluate: {speed: null}\n"))
    assert distill("run", recipe, "--run-dir", "a").code == 0
    assert distill("run", recipe, "--run-dir", "b", "--set", "stages.distill.num_steps=2").code == 0
    result = distill("report", "a", "b")
    assert result.code == 0
    assert result.out.endswith(f"report: {Path('a', 'comparison', 'index.html')}\n")
    losses = {run: json.loads(Path(run, "evaluate", "rows.json").read_text())[2]["loss_nats"] for run in "ab"}
    better, worse = sorted(losses, key=lambda run: losses[run])
    assert result.out.index(f"| {better}/distill |") < result.out.index(f"| {worse}/distill |")
    assert f"| Differing keys | {better} | {worse} |" in result.out
    steps = {"a": "1", "b": "2"}
    assert f"| stages.distill.num_steps | {steps[better]} | {steps[worse]} |" in result.out
    assert result.out.count("| stages.") == 1
    page = (tmp_path / "a" / "comparison" / "index.html").read_text(encoding="utf-8")
    names = ["teacher", *(f"{run}/{stage}" for run in "ab" for stage in ("prune", "distill", "quantize"))]
    for text in (result.out, page):
        assert [name for name in names if name not in text] == []
    for run in "ab":
        for row in json.loads(Path(run, "evaluate", "rows.json").read_text()):
            assert f"{row['perplexity']:.3g}"[:4] in result.out, row["name"]

    Path("prompts.txt").write_text("row 7 of\n\nthe small model\n")
    result = distill("compare", "a", "--prompts", "prompts.txt", "--new-tokens", "3")
    assert result.code == 0
    assert [line for line in result.out.splitlines() if line.startswith("> ")] == ["> row 7 of", "> the small model"]
    answered = [line.split()[0] for line in result.out.splitlines() if line.startswith("  ")]
    assert answered == ["teacher", "prune", "distill", "quantize"] * 2


def test_a_trial_of_a_sweep_has_a_folder_and_an_id_of_its_own(
    distill: Distill, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    result = distill("run", recipe, "stages.prune.keep.num_hidden_layers=2", "seed=3", "--only", "prune")
    assert result.code == 0, result.err
    text = Path("runs", "tiny-trial7", "recipe.yaml").read_text()
    assert "\nseed: 3\n" in text
    assert "num_hidden_layers: 2\n" in text
    assert trial_of_sweep() == "trial7"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert trial_of_sweep() is None
    assert distill("run", recipe, "stages.prune.kep=1").code == 2


def test_one_stage_without_a_recipe(distill: Distill, teacher: Path, tmp_path: Path) -> None:
    text_file(tmp_path / "held.jsonl", 300)
    result = distill("prune", teacher, "--keep", "intermediate_size=50%", "--text", "held.jsonl")
    assert result.code == 0, result.err
    pruned = Path("runs", "model-prune", "prune", "model")
    assert f"result: {pruned}\nas a recipe: {Path('runs', 'model-prune', 'recipe.yaml')}\n" in result.out
    assert json.loads((pruned / "config.json").read_text())["intermediate_size"] == 32
    result = distill("quantize", pruned, "--set", "group_size=32", "--text", "held.jsonl", "--out", "q")
    assert result.code == 0, result.err
    assert "as int4, group 32" in result.out
    small = Path("q", "quantize", "model")
    result = distill("evaluate", teacher, pruned, small, "--no-speed", "--text", "held.jsonl", "--out", "e")
    assert result.code == 0, result.err
    rows = json.loads(Path("e", "evaluate", "rows.json").read_text())
    assert [(row["name"], row["role"]) for row in rows] == [
        ("teacher", "teacher"),
        (str(pruned), "student"),
        (str(small), "student"),
    ]
    result = distill("export", small, "--text", "held.jsonl", "--out", "x")
    assert result.code == 0, result.err
    assert Path("x", "export", "model-huggingface", "README.md").is_file()
    assert distill("resume", "x").code == 0
    for arguments, said in (
        (["prune", teacher, "--keep", "intermediat=50%"], "did you mean 'intermediate_size'?"),
        (["prune", teacher, "--keep", "intermediate_size"], "expected KEY=SIZE"),
        (["prune", "nowhere", "--keep", "intermediate_size=1"], "nowhere: no such folder"),
        (["quantize", teacher, "--quantizer", "int4"], "no quantizer called 'int4'"),
        (["quantize", teacher, "--set", "bitz=3"], "stages.quantize.bitz: unknown key"),
        (["export", teacher, "--text", "texts.doc"], "--text texts.doc: no such file or folder"),
    ):
        result = distill(*arguments)
        assert (result.code, said in result.err) == (2, True), result.err


def test_doctor(distill: Distill, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("distill.doctor._reachable", lambda host: False)
    result = distill("doctor")
    assert result.code == 0
    assert f"distill {__version__}" in result.out
    for said in (
        f"torch {torch.__version__}",
        "CPU threads: ",
        " GB memory free",
        " GB disk free",
        "W&B with wandb: auto",
    ):
        assert said in result.out
    assert ("no GPU" in result.out) is not torch.cuda.is_available()
    assert "Hugging Face Hub: not reachable" in result.out


def test_cache_info_and_verify(distill: Distill, recipe: Path, tmp_path: Path) -> None:
    stage = f"  cache: {{kind: cache_teacher, codec: hidden, folder: {tmp_path / 'cache'}}}\n"
    text = recipe.read_text(encoding="utf-8").replace("  distill:\n", stage + "  distill:\n    teacher: cache\n")
    recipe.write_text(text, encoding="utf-8")
    assert distill("run", recipe, "--run-dir", tmp_path / "run", "--only", "prune").code == 0
    assert distill("run", recipe, "--run-dir", tmp_path / "run", "--only", "cache").code == 0
    result = distill("cache", "info", tmp_path / "cache")
    assert result.code == 0
    assert "hidden" in result.out
    assert "read as wrapped rows of 16 tokens" in result.out
    assert " bytes per token" in result.out
    assert re.search(r"when it was begun: .*KL", result.out)
    assert distill("cache", "verify", tmp_path / "cache").code == 0
    file = next((tmp_path / "cache" / "train").glob("shard-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = distill("cache", "verify", tmp_path / "cache")
    assert result.code == 1
    assert f"{file}: damaged (rows " in result.err
    result = distill("cache", "verify", tmp_path / "nowhere")
    assert result.code == 2
    assert "no teacher cache there" in result.err
