"""A model folder may bring code along. No verb and no stage runs it, or asks whether to run it."""

from __future__ import annotations

import ast
import builtins
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import distill
from distill.core.errors import InputError
from tests.verbs import VERBS

ROOT = Path(__file__).parents[1]
DOOR = ROOT / "distill" / "pretrained.py"

# ------------------------------------------------------------------------------------------------- the source itself

LOADERS = {
    *("from_pretrained", "from_config", "_from_config", "load_adapter", "load_custom_generate", "load_from_disk"),
    *("get_class_from_dynamic_module", "get_cached_module_file", "load_dataset", "load_state_dict_from_url"),
    *("from_single_file", "load_lora_weights", "load_peft_weights", "pipeline"),
}
"""Functions of transformers, peft, diffusers and datasets that may read, build or run what comes with a model."""
ELSEWHERE = {
    ("distill/pruning/surgery.py", "build.from_pretrained(None,"),  # reads nothing: weights and config are handed over
    ("distill/data/hub.py", "datasets.load_dataset("),  # which knows no code in data sets any more
    ("distill/data/saved_rows.py", "datasets.load_from_disk("),  # Arrow files and JSON
}


def wrong_calls(source: str, name: str, *, is_door: bool = False) -> list[str]:
    """Uses of a loader outside of the one module for it, and in it those without an argument that makes them safe."""
    tree, found = ast.parse(source), []
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in LOADERS:
            found.append(f"{name}:{node.lineno}: names {node.value} as text")
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
            found.append(f"{name}:{node.value.lineno}: trust_remote_code={ast.unparse(node.value)}")
        used = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if isinstance(node, ast.ImportFrom) and (named := LOADERS & {alias.name for alias in node.names}):
            found.append(f"{name}:{node.lineno}: imports {named.pop()}")
        if used not in LOADERS:
            continue
        call = calls.get(id(node))
        if not is_door or call is None:
            text = ast.unparse(call or node)
            if not any(name == file and text.startswith(start) for file, start in ELSEWHERE):
                found.append(f"{name}:{node.lineno}: {text[:60]}")
            continue
        found += [f"{name}:{node.lineno}: {used} lacks {missing}" for missing in _lacking(call, ast.unparse(node))]
    return found


def _lacking(call: ast.Call, called: str) -> set[str]:
    given = {f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in call.keywords}
    wanted = {"trust_remote_code=False"} if called != "GenerationConfig.from_pretrained" else set()
    if called.endswith("from_pretrained"):
        wanted.add("local_files_only=is_folder(location)")
    if called == "loader.from_pretrained":
        wanted.add("use_safetensors=True")
    return wanted - given


def test_one_module_loads_what_comes_from_outside_and_with_every_safe_argument() -> None:
    files = [file for name in ("distill", "benchmarks", "docs", "notebooks") for file in (ROOT / name).rglob("*.py")]
    assert {DOOR, ROOT / "docs" / "generate.py", ROOT / "notebooks" / "execute.py"} <= {*files}
    wrong = [
        line
        for file in sorted(files)
        for line in wrong_calls(file.read_text("utf-8"), str(file.relative_to(ROOT)), is_door=file == DOOR)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "is_door"),
    [
        ("AutoTokenizer.from_pretrained(place)", False),
        ("AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=is_folder(location))", False),
        ("load = AutoTokenizer.from_pretrained", False),
        ("getattr(AutoTokenizer, 'from_pretrained')(place)", False),
        ("from datasets import load_dataset", False),
        ("model.load_adapter(place)", False),
        ("PeftModel.from_pretrained(model, place)", True),
        ("AutoConfig.from_pretrained(location, local_files_only=is_folder(location))", True),
        ("AutoConfig.from_pretrained(location, trust_remote_code=True, local_files_only=is_folder(location))", True),
        ("AutoConfig.from_pretrained(location, trust_remote_code=False)", True),
        ("loader.from_pretrained(l, trust_remote_code=False, local_files_only=is_folder(location))", True),
        ("loader.from_config(config)", True),
        ("anything_else(place, trust_remote_code=trusted)", False),
    ],
)
def test_the_rule_finds_a_loader_that_is_not_safe(source: str, is_door: bool) -> None:
    assert wrong_calls(source, "x.py", is_door=is_door)


# ------------------------------------------------------------------------------------------------ folders with code


class Opened:
    """What a pickle runs when it is opened."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def with_code(folder: Path, ran: Path, *, kind: str = "known") -> Path:
    """Put code beside a model wherever transformers or peft would look for some.

    Args:
        folder: of a plain model.
        ran: what the code makes when it runs.
        kind: "known" keeps the architecture, so that all but the tokenizer loads without the code; "unknown" has one
            that only the code can load; "tokenizer" changes the tokenizer alone.
    """
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Opened(ran)))
    classes = ("Config", "Model", "ModelForCausalLM", "ModelForMaskedLM", "Tokenizer", "Processor", "FeatureExtractor")
    own: dict[str, Any] = {f"Auto{name}": f"mine.{name}" for name in classes}
    shell = "{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}"
    changes: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "auto_map": own | {"AutoTokenizer": ["mine.Tokenizer", "mine.Tokenizer"]},
            "tokenizer_class": "MineTokenizer",
            "chat_template": shell,
        },
        "processor_config.json": {"auto_map": own, "processor_class": "MineProcessor"},
        "preprocessor_config.json": {"auto_map": own, "image_processor_type": "MineProcessor"},
    }
    if kind != "tokenizer":
        changes["generation_config.json"] = {"auto_map": own, "custom_generate": "mine.py"}
        changes["config.json"] = {
            "auto_map": own,
            "custom_pipelines": {"x": {"impl": "mine.Pipe", "pt": ["AutoModel"]}},
        }
    if kind == "unknown":
        changes["config.json"] |= {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    for name, change in changes.items():
        file = folder / name
        old = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(old | change))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    from distill.data.tokenizer import train_tokenizer
    from distill.models.load import new_config, new_model

    folder = tmp_path_factory.mktemp("plain") / "model"
    tokenizer = train_tokenizer(["row of the text that a small model reads"] * 5, 262, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    keys = {"model_type": "llama", "max_position_embeddings": 32, "vocab_size": len(tokenizer)}
    new_model(new_config(keys | sizes), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Terminal:
    """The command line in this process, with somebody at it who answers yes to everything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ran: Path):
        self.monkeypatch, self.capfd, self.ran, self.asked = monkeypatch, capfd, ran, list[str]()
        self.num_commands = 0
        monkeypatch.setattr(builtins, "input", lambda prompt="": self.asked.append(prompt) or "y")

    def __call__(self, *arguments: str | Path, code: int | None = None) -> str:
        from distill.cli import main

        self.num_commands += 1
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
        self.monkeypatch.setattr(sys, "argv", ["distill", *map(str, arguments)])
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = "".join(self.capfd.readouterr())
        assert not self.ran.exists(), (arguments, said)
        assert self.asked == []
        assert "[y/N]" not in said
        assert "Traceback" not in said
        assert code is None or ended.value.code == code, (arguments, said)
        return said


@pytest.fixture
def terminal(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> Iterator[Terminal]:
    monkeypatch.chdir(tmp_path)
    terminal = Terminal(monkeypatch, capfd, tmp_path / "ran")
    yield terminal
    record_property("commands", terminal.num_commands)  # which `benchmarks.faults` adds up for its page


def recipe_file(
    stages: dict[str, Any], teacher: Path | None = None, tokenizer: Path | None = None, words: Path | None = None
) -> Path:
    Path("text.jsonl").write_text("".join(json.dumps({"text": f"row {i} of the text"}) + "\n" for i in range(40)))
    question = {"question": "a?", "answer": "b", "document": "", "group": "trained", "place": "p"}
    Path("exam.jsonl").write_text(json.dumps(question))
    data: dict[str, Any] = {"train": {"kind": "jsonl", "path": "text.jsonl"}, "sequence_length": 16}
    data |= {"validation_tokens": 60, "calibration_sequences": 2}
    data |= {"tokenizer": str(tokenizer)} if tokenizer is not None else {}
    data |= {"augment": {"replace_words": {"model": str(words)}}} if words is not None else {}
    recipe = {"name": "foreign", **({"teacher": str(teacher)} if teacher is not None else {}), "data": data}
    recipe |= {"stages": stages, "compute": {"accelerator": "cpu"}, "logging": {"wandb": "disabled"}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return Path("recipe.yaml")


STEP = {"num_steps": 1, "batch_size": 2}
KEYS: dict[str, dict[str, Any]] = {
    "finetune.model": STEP,
    "prune.model": {"keep": {"intermediate_size": 32}},
    "sparsify.model": {"pattern": "2:4"},
    "cache_teacher.teacher": {},
    "synthesize.writer": {"make": {"kind": "qna", "path": "builtin:qna"}},
    "distill.student": STEP,
    "distill.teacher": {"student": "PLAIN", **STEP},
    "quantize.student": {"num_steps": 0},
    "quantize.teacher": {"student": "PLAIN", **STEP},
    "evaluate.models": {"speed": None},
    "evaluate.controls": {"models": ["PLAIN"], "speed": None},
    "evaluate.teacher": {"models": ["PLAIN"], "speed": None},
    "exam.models": {"questions": "exam.jsonl", "baseline": "PLAIN"},
    "exam.baseline": {"questions": "exam.jsonl"},
    "exam.judge": {"questions": "exam.jsonl", "forgetting": False, "num_choices": 0},
    "export.model": {"verify_sequences": 1},
}
"""Key of a stage that may name a folder -> the rest of the stage."""


def test_these_are_all_keys_that_can_name_a_model() -> None:
    from distill.recipe import Recipe
    from distill.stages import STAGES

    assert {name.partition(".")[0] for name in KEYS} | {"report"} == set(STAGES)
    for kind in set(STAGES) - {"report"}:
        named = {key.partition(".")[2]: rest for key, rest in KEYS.items() if key.startswith(f"{kind}.")}
        stage = {key: value for rest in named.values() for key, value in rest.items()}
        stage |= {key: ["org/x"] if key in ("models", "controls") else "org/x" for key in named}
        data = {"train": "python_docs", "sequence_length": 16}
        recipe = Recipe.model_validate({"name": "a", "teacher": "org/t", "data": data, "stages": {kind: stage}})
        keys = {str(path[0]) for path, _ in recipe.stages[kind].references()}
        assert keys == set(named), f"{kind}: add the keys that are missing to KEYS"


@pytest.mark.parametrize("kind", ["unknown", "tokenizer"])
def test_no_key_of_a_recipe_leads_to_code(kind: str, plain: Path, tmp_path: Path, terminal: Terminal) -> None:
    """``check`` and ``run`` of a recipe that names the folder in one place; elsewhere is a plain model."""
    evil = with_code(Path(shutil.copytree(plain, tmp_path / "evil")), terminal.ran, kind=kind)
    refused = 0

    def attempt(stages: dict[str, Any], **recipe: Path) -> None:
        nonlocal refused
        file = recipe_file(stages, **recipe)
        terminal("check", file)
        said = terminal("run", file, "--run-dir", f"run-{refused}", code=2)
        assert str(evil) in said or "model_type 'mine'" in said
        refused += 1

    attempt({"distill": {"student": str(plain), **STEP}}, teacher=evil)
    attempt({"distill": {"student": str(plain), **STEP}}, teacher=plain, tokenizer=evil)
    attempt({"distill": {"student": str(plain), **STEP}}, teacher=plain, words=evil)
    for key, rest in KEYS.items():
        stage, _, name = key.partition(".")
        rest = json.loads(json.dumps(rest).replace("PLAIN", str(plain)))
        attempt({stage: {name: [str(evil)] if name in ("models", "controls") else str(evil), **rest}}, teacher=plain)
    measured = {"evaluate": {"models": ["teacher"], "speed": None}}
    attempt(measured | {"report": {"models": [str(evil)], "prompts": ["row"]}}, teacher=plain)
    assert refused == len(KEYS) + 4


@pytest.fixture
def finished(plain: Path, tmp_path: Path, terminal: Terminal) -> Path:
    """A run with every kind of stage, from a folder whose architecture is known and that has code beside it."""
    teacher = Path(shutil.copytree(plain, tmp_path / "teacher"))
    keep = (teacher / "tokenizer_config.json").read_text()
    with_code(teacher, terminal.ran)
    (teacher / "tokenizer_config.json").write_text(keep)  # else no stage would get anywhere
    stages: dict[str, Any] = {
        "corrected": {"kind": "finetune", "model": "teacher", **STEP},
        "prune": {"keep": {"intermediate_size": 32}},
        "sparsify": {"model": "teacher", "pattern": "2:4"},
        "cache": {"kind": "cache_teacher", "teacher": "teacher"},
        "distill": {"student": "prune", "teacher": "cache", **STEP},
        "quantize": {"student": "distill", "num_steps": 0},
        "evaluate": {"models": ["teacher", "quantize"], "speed": None},
        "export": {"model": "teacher", "verify_sequences": 1, "title": "delivered"},
        "report": {"prompts": ["row"], "models": ["teacher", "distill"], "new_tokens": 2},
    }
    terminal("check", recipe_file(stages, teacher=teacher), code=0)
    terminal("run", "recipe.yaml", "--run-dir", "run", code=0)
    assert not list((tmp_path / "run").rglob("*.py"))
    return tmp_path / "run"


def test_no_verb_runs_code(finished: Path, terminal: Terminal) -> None:
    assert "row" in terminal("compare", finished, "--prompt", "row", "--new-tokens", "2", code=0)
    teacher = finished.parent / "teacher"
    for kind, what in (("tokenizer", "tokenizer"), ("unknown", "config")):
        with_code(teacher, terminal.ran, kind=kind)
        assert f"teacher: cannot load the {what}" in terminal("compare", finished, "--prompt", "row", code=2)
    for model in finished.glob("*/model"):
        with_code(model, terminal.ran, kind="unknown")
    assert "mine.py" in terminal("compare", finished, "--prompt", "row", code=2)
    terminal("report", finished, code=0)
    terminal("resume", finished, code=2)
    terminal("run", "recipe.yaml", "--run-dir", finished, "--only", "report", code=2)
    for command in ("info", "verify"):
        terminal("cache", command, teacher)
        terminal("cache", command, next(finished.glob("data/teacher-*")), code=0)
    for command in ("list", "doctor", "schema"):
        terminal(command, code=0)


@pytest.mark.parametrize("kind", ["unknown", "tokenizer"])
def test_no_verb_that_takes_a_folder_runs_its_code(kind: str, plain: Path, tmp_path: Path, terminal: Terminal) -> None:
    evil = with_code(Path(shutil.copytree(plain, tmp_path / "evil")), terminal.ran, kind=kind)
    shutil.copy(recipe_file({"evaluate": {"speed": None}}, teacher=evil), evil)  # for those that want a run's folder
    for verb in VERBS:
        if "--run-dir" not in verb:  # a run goes there, and reads no model in it
            terminal(*(str(evil) if word == "PATH" else word for word in verb))
    assert terminal.num_commands == len(VERBS) - 1
    assert not terminal.ran.exists()


def test_the_python_api_runs_no_code(plain: Path, tmp_path: Path, terminal: Terminal) -> None:
    for kind, what in (("tokenizer", "tokenizer"), ("unknown", "config")):
        place = with_code(Path(shutil.copytree(plain, tmp_path / kind)), terminal.ran, kind=kind)
        with pytest.raises(InputError, match=f"cannot load the {what}"):
            distill.load(str(place))
        assert not terminal.ran.exists()


@pytest.mark.exhaustive
def test_real_processes_with_yes_on_their_input(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran, place = tmp_path / "ran", Path(shutil.copytree(plain, tmp_path / "teacher"))
    recipe_file({"evaluate": {"speed": None}, "report": {"models": ["teacher"], "prompts": ["row"]}}, teacher=place)
    with_code(place, ran, kind="tokenizer")
    for command in (["run", "recipe.yaml", "--run-dir", "run"], ["compare", "run", "--prompt", "row"]):
        Path("run").mkdir(exist_ok=True)
        shutil.copy("recipe.yaml", "run")
        done = subprocess.run(
            [sys.executable, "-m", "distill", *command], input="y\n" * 50, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2, done.stderr
        assert "cannot load the tokenizer" in done.stderr
        assert "[y/N]" not in done.stdout + done.stderr
        assert not ran.exists()


def test_the_code_does_run_where_somebody_lets_it(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would prove nothing."""
    from transformers import AutoConfig, AutoTokenizer

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for kind, loader in (("unknown", AutoConfig), ("tokenizer", AutoTokenizer)):
        evil = with_code(Path(shutil.copytree(plain, tmp_path / kind)), tmp_path / f"ran-{kind}", kind=kind)
        with pytest.raises(Exception):  # noqa: B017, PT011 - the code defines none of the classes
            loader.from_pretrained(evil, trust_remote_code=True)
        assert (tmp_path / f"ran-{kind}").exists()
    with pytest.raises(Exception):  # noqa: B017, PT011
        torch.load(evil / "pytorch_model.bin", weights_only=False)
