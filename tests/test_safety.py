"""What comes from outside is data: damage, paths, code and secrets in it go nowhere."""

from __future__ import annotations

import ast
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from distill.core import digest
from distill.core.artifact import Artifact
from distill.core.errors import DistillError, InputError, RecipeError
from distill.core.run_folder import Run
from distill.core.seal import marks_of
from distill.core.source import parse
from distill.core.stored import write_checked
from distill.data.packed_rows import PackedRows
from distill.data.packing import VERSION, read_tokens, store_tokens
from distill.data.teacher_cache import CODECS
from distill.data.teacher_cache import write_cache as writing
from distill.data.teacher_cache.base import CodecSpec
from distill.data.teacher_cache.cache import CachedRows, CacheLocation
from distill.data.teacher_cache.identity import Identity
from distill.data.teacher_cache.verify import describe, verify
from distill.data.teacher_cache.write_cache import Live, fill
from distill.models.load import load_model
from distill.pruning.origin import Origin
from distill.recipe import Recipe
from distill.runner import run
from distill.stages.prune.search.measurement_cache import MeasurementCache
from distill.training.checkpoint import AtomicCheckpointIO, checkpoint_path, newest_valid
from distill.training.metrics import read_rows

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def damaged(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Cut, flipped, spliced with another file, overwritten or repeated, as the dice fall."""
    at, found = dice.randrange(len(data)), bytearray(data)
    match dice.choice(("cut", "flip", "splice", "insert", "zeros", "repeat")):
        case "cut":
            return data[:at]
        case "flip":
            for _ in range(dice.choice((1, 1, 4, 30))):
                found[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        case "splice":
            return data[:at] + other[dice.randrange(len(other)) :]
        case "insert":
            found[at:at] = dice.randbytes(dice.randrange(1, 20))
        case "zeros":
            found[at : at + 64] = bytes(len(found[at : at + 64]))
        case "repeat":
            found[at:at] = data[max(0, at - 50) : at] * dice.randrange(1, 5)
    return bytes(found)


def attack(files: list[Path], read: Callable[[], Any], times: int) -> int:
    """Damage one file after another and read: fine, or refused by one of our errors; returns how often refused."""
    folder, whole = files[0].parents[1], {file: file.read_bytes() for file in files}
    before, refusals = sorted(folder.rglob("*")), []
    read()
    for seed in range(times):
        dice = random.Random(seed)
        file = files[seed % len(files)]
        file.write_bytes(damaged(whole[file], whole[dice.choice(files)], dice))
        try:
            read()
        except DistillError as error:
            refusals.append(str(error))
        except Exception as error:
            raise AssertionError(f"{file.name}, seed {seed}: {type(error).__name__}: {error}") from error
        file.write_bytes(whole[file])
    assert sorted(folder.rglob("*")) == before
    assert all(line.strip() for line in refusals)
    return len(refusals)


# -------------------------------------------------------------------------------------------------- damaged input


def test_a_damaged_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipes" / "recipe.yaml"
    file.parent.mkdir()
    for recipe in RECIPES[:3]:
        file.write_bytes(recipe.read_bytes())
        assert attack([file], lambda: Recipe.load(file), 30) > 10


WRONG: tuple[Any, ...] = (
    None, True, -1, 1e300, 10**40, "", "x", "../x", [], {}, [[]], {"kind": "x"}, {"a": {"b": [1]}}, float("nan"),
    {"kind": None}, {"kind": [1]}, {"kind": {}},
)  # fmt: skip


def test_any_value_in_any_place_of_a_recipe() -> None:
    def paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
        return [path, *(deep for key, value in items for deep in paths(value, (*path, key)))]

    mistakes: list[str] = []
    for seed in range(50):
        dice = random.Random(seed)
        data = parse(dice.choice(RECIPES).read_text(encoding="utf-8"), "recipe").data
        *parents, last = dice.choice(paths(data)[1:])
        holder: Any = data
        for key in parents:
            holder = holder[key]
        holder[last] = dice.choice(WRONG)
        try:
            Recipe.from_text(
                yaml.safe_dump(data, sort_keys=False), set=[f"{last}={dice.choice(('x', '[', '', '{a: 1}'))}"]
            )
        except RecipeError as error:
            mistakes += error.mistakes
    assert len(mistakes) > 40
    assert [line for line in mistakes if not line.startswith(("recipe:", "--set "))] == []


def train_rows_of(file: Path) -> PackedRows:
    file.parent.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(0).integers(0, 40, 19 * 16 + 7).astype(np.uint16)
    return PackedRows(store_tokens(file, [ids], 0), 16)


@pytest.mark.parametrize("kind", CODECS)
def test_a_damaged_cache(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SHARD_BYTES", 800)
    codec: CodecSpec = CODECS[kind]()  # type: ignore[assignment]
    blocks, width = train_rows_of(tmp_path / "train.bin"), 8 if codec.reads == "hidden" else 40
    place = CacheLocation(tmp_path / "cache" / "train", Identity.of("t", "k", blocks, codec), codec, width, 40)
    table = torch.randn(40, 8)
    live = Live(lambda batch: table[batch["input_ids"]], lambda rows: rows @ table.T, torch.device("cpu"))
    fill(place, blocks.tokens, range(20), lambda: live, batch_size=4, what="train", say=lambda line: None)

    def read() -> None:
        refusals = []
        for what in (
            lambda: describe(CacheLocation.there(place.folder)),
            lambda: verify(place.folder),
            lambda: CachedRows(blocks, place)[list(range(20))],
        ):
            try:
                what()
            except DistillError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]

    assert attack(sorted([place.folder / "cache.json", *place.folder.glob("shard-*")]), read, 24) > 12


def written_tokens(folder: Path) -> Path:
    """A finished token file."""
    blocks = train_rows_of(folder / "validation.bin")
    file = Path(blocks.tokens.path)
    file.with_suffix(".bytes").write_bytes(bytes(4 * blocks.tokens.num_tokens))
    header = {key: value for key, value in asdict(blocks.tokens).items() if key != "path"} | {"version": VERSION}
    marks = marks_of(file.parent, [file.with_suffix(suffix).name for suffix in (".bin", ".bytes", ".bounds")])
    header["files"] = {name: asdict(mark) for name, mark in marks.items()}
    write_checked(file.with_suffix(".json"), header)
    return file


@pytest.mark.parametrize("suffix", [".bin", ".bytes", ".bounds"])
def test_tokens_are_not_believed_by_size_and_time(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written_tokens(tmp_path / "run" / "data")
    assert read_tokens(file) is not None
    part = file.with_suffix(suffix)
    before, content = part.stat(), bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_tokens(file) is None
    assert "not what was written; the text is tokenized again" in capsys.readouterr().err


def test_large_tokens_are_read_once_per_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "LASTING_BYTES", 1)
    monkeypatch.setattr(digest, "SETTLED_NS", 0)
    file = written_tokens(tmp_path / "run" / "data")
    assert read_tokens(file) is not None
    monkeypatch.setattr(digest, "_KNOWN", {})  # as another process
    monkeypatch.setattr(digest, "_PIECE", 0)  # what would be read again is empty
    assert read_tokens(file) is not None


def test_damaged_tokens(tmp_path: Path) -> None:
    file = written_tokens(tmp_path / "run" / "data")
    anew: list[bool] = []

    def read() -> None:
        tokens = read_tokens(file)
        anew.append(tokens is None)
        if tokens is not None:
            tokens.bytes_of_tokens().sum()
            for packing in ("wrapped", "best_fit"):
                rows = PackedRows(tokens, 16, packing=packing)  # type: ignore[arg-type]
                rows[list(range(len(rows)))]

    attack([file.with_suffix(suffix) for suffix in (".json", ".bin", ".bytes", ".bounds")], read, 80)
    assert anew.count(True) > 10, anew  # what is cut short, or says another size, is not taken for the text
    assert anew[0] is False


def test_a_damaged_checkpoint_is_never_gone_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "stage" / "checkpoints"
    for step in (1, 2):
        state = {"global_step": step, "state_dict": {"a": torch.randn(50), "b": torch.randn(5, 5)}}
        AtomicCheckpointIO().save_checkpoint(state, checkpoint_path(folder, step))
    newest = checkpoint_path(folder, 2)
    expected = torch.load(newest, weights_only=True)

    def read() -> None:
        path, complaints = newest_valid(folder)
        assert path is not None
        assert (path == newest) == (not complaints)
        if path == newest:  # what no checksum covers may change, what is read may not
            found = torch.load(path, weights_only=True)
            assert all(torch.equal(found["state_dict"][name], expected["state_dict"][name]) for name in ("a", "b"))

    attack([newest], read, 60)


def test_damaged_notes_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "stage"
    folder.mkdir(parents=True)
    lineage = dict.fromkeys(("stage", "kind", "parent", "teacher", "base_model", "licence", "input_hash"), "x")
    texts = {
        "distill.json": json.dumps(lineage),
        "plan.json": json.dumps({"layers": [0, 1], "hidden_channels": [0, 2, 3]}),
        "search.json": json.dumps({"cut whole": {"kl": 1.0}}),
        "metrics.jsonl": '{"step": 1, "tokens": 2, "train/kl": 0.5}\n' * 3,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    Run(folder.parent).finish("stage", "x", 1.0, {})
    refused: dict[str, int] = {}
    for name, read in (
        ("DONE", lambda: Run(folder.parent).done("stage")),
        ("distill.json", lambda: Artifact("x", str(folder)).lineage()),
        ("plan.json", lambda: Origin.read(folder / "plan.json")),
        ("search.json", lambda: MeasurementCache(folder / "search.json")),
        ("metrics.jsonl", lambda: [row["step"] for row in read_rows(folder)]),
    ):
        refused[name] = attack([folder / name], read, 40)
    # the others are made again, or read as far as they go
    assert refused["plan.json"] > 20, refused
    assert refused["DONE"] > 20, refused


def test_a_damaged_model(tiny_folders: list[Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_folders[1], tmp_path / "models" / "model"))
    files = [folder / name for name in ("config.json", "model.safetensors", "generation_config.json")]
    assert attack(files, lambda: load_model(str(folder)), 30) > 6


# -------------------------------------------------------------------------------------------------- code and paths


def test_nothing_from_outside_is_executed() -> None:
    for file in sorted((ROOT / "distill").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {"pickle", "dill", "marshal", "shelve"} & {alias.name for alias in node.names}, file
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "os.system", "pickle.load", "np.load", "yaml.load"}, file
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called != "torch.load" or given.get("weights_only") == "True", f"{file}: {called}"
            assert given.get("shell", "False") == "False", f"{file}: {called}"


def test_code_that_comes_with_a_model_is_not_run(tiny_folders: list[Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_folders[1], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="cannot load the config"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".", "a\\b", "x\n", "", "~", "C:x"])
def test_no_name_in_a_recipe_leaves_the_run_folder(name: str) -> None:
    text = RECIPES[[file.stem for file in RECIPES].index("quickstart")].read_text(encoding="utf-8")
    data = parse(text, "recipe").data
    for change in ({"name": name}, {"stages": {name: {"kind": "report"}} | data["stages"]}):
        with pytest.raises(RecipeError, match=r"cannot be the name of a stage|a name holds letters"):
            Recipe.from_text(yaml.safe_dump(data | change, sort_keys=False))
    with pytest.raises(RecipeError, match="a name holds letters, digits"):
        Recipe.from_text(text, set=[f"stages.export.title={json.dumps(name)}"])


# -------------------------------------------------------------------------------------------------------- secrets

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnop",
    "HUGGING_FACE_HUB_TOKEN": "hf_qrstuvwxyzabcdef",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_PASSWORD": "correct-horse-battery",
}
IN_ADDRESSES = {"HF_ENDPOINT": "hf-pass-1234", "HTTPS_PROXY": "proxy-pass-1234", "WANDB_BASE_URL": "wandb-pass-1234"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An environment full of secrets; returns all of them."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for name, value in IN_ADDRESSES.items():
        monkeypatch.setenv(name, f"http://someone:{value}@127.0.0.1:9")
    return [*SECRETS.values(), *IN_ADDRESSES.values()]


def test_errors_show_no_secrets(environment: list[str]) -> None:
    text = " ".join(f"https://user:{secret}@host/path and {secret}" for secret in environment[:4])
    text += " ".join(f"http://someone:{secret}@127.0.0.1:9" for secret in environment[4:])
    shown = str(InputError(f"x: cannot be loaded ({text})"))
    assert [secret for secret in environment if secret in shown] == []
    assert "x: cannot be loaded (https://***@host/path and ***" in shown


@pytest.mark.parametrize("value", ["https://me:hunter22@host/text.jsonl", "hf_abcdefghijklmnop"])
def test_a_recipe_with_a_secret_is_refused(environment: list[str], value: str) -> None:
    text = "name: x\ndata: {train: {kind: jsonl, path: a.jsonl}, sequence_length: 16}\nstages: {report: {}}\n"
    with pytest.raises(RecipeError, match=r"--set data\.train\.path: holds a password or token") as refusal:
        Recipe.from_text(text, set=[f"data.train.path={value}"])
    assert value not in str(refusal.value)


@pytest.mark.parametrize("place", ["runs/hf_abcdefghijklmnop", "runs/https://me:hunter22@host/x"])
def test_a_run_folder_with_a_secret_in_its_path_is_refused(
    environment: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    data = "{train: {kind: jsonl, path: a.jsonl}, sequence_length: 16, tokenizer: {vocab_size: 300}}"
    text = f"name: x\ndata: {data}\nstages: {{report: {{}}}}\n"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="its path holds a password or token") as refusal:
        run(Recipe.from_text(text), place)
    assert refusal.value.exit_code == 2
    assert [secret for secret in [*environment, "hunter22"] if secret in str(refusal.value)] == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "hf_abcdefghijklmnop").mkdir()
    monkeypatch.chdir(tmp_path / "hf_abcdefghijklmnop")  # where the run's folder would be
    with pytest.raises(InputError, match="its path holds a password or token"):
        run(Recipe.from_text(text))


def test_a_run_writes_no_secret(
    environment: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from distill.cli import main
    from distill.data.tokenizer import train_tokenizer
    from distill.models.load import new_config, new_model

    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = train_tokenizer(["row of the text"], 270, Path("model"))
    new_model(new_config({"model_type": "llama", "vocab_size": len(tokenizer), **sizes}), seed=0).save_pretrained(
        "model"
    )
    tokenizer.save_pretrained("model")
    Path("text.jsonl").write_text("".join(json.dumps({"text": f"row {i} of the text"}) + "\n" for i in range(40)))
    recipe = {
        "name": "quiet",
        "teacher": "./model",
        "data": {"train": {"kind": "jsonl", "path": "text.jsonl"}, "sequence_length": 16, "validation_tokens": 60},
        "stages": {
            "distill": {"student": "teacher", "num_steps": 2, "batch_size": 2},
            "evaluate": {"speed": None},
            "export": {"model": "distill", "verify_sequences": 1},
            "report": {"prompts": []},
        },
        "compute": {"accelerator": "cpu", "checkpoint_every_steps": 1},
        "logging": {"wandb": "offline"},
    }
    named = Path(SECRETS["MY_PASSWORD"])  # a folder above the recipe, whose path the command line has
    named.mkdir()
    (named / "quiet.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    kept: list[bytes] = []  # checkpoints are gone when their stage has finished
    save = AtomicCheckpointIO.save_checkpoint
    monkeypatch.setattr(
        AtomicCheckpointIO,
        "save_checkpoint",
        lambda self, state, path, storage_options=None: (save(self, state, path), kept.append(Path(path).read_bytes())),
    )
    monkeypatch.setattr(sys, "argv", ["distill", "run", str(named / "quiet.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    said = "".join(capfd.readouterr())
    assert ended.value.code == 0, said
    written = {str(file): file.read_bytes() for file in Path("runs").rglob("*") if file.is_file()}
    assert any("wandb" in name for name in written)
    assert kept
    written |= {"what was said": said.encode(), **{f"checkpoint {i}": data for i, data in enumerate(kept)}}
    assert [(secret, name) for secret in environment for name, data in written.items() if secret.encode() in data] == []
