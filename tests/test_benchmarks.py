"""What the repository says it measured: results of one shape, a page made of nothing else, and cells that are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from benchmarks import (
    books,
    chat_templates,
    faults,
    losses,
    matrix,
    pruning,
    pruning_cuts,
    pruning_peers,
    quantization,
    quantization_grids,
    result,
    scoring,
    tables,
    threads,
)
from benchmarks.quantization_grids import GRIDS, METHODS
from distill.core.artifact import write_text
from distill.core.run_folder import Run
from distill.losses import LOSSES
from distill.models.layouts import layout_for
from distill.pruning import CRITERIA
from distill.pruning.select import target_sizes
from distill.recipe import Recipe
from distill.reporting.tradeoff import Row, to_json
from distill.stages.quantize import Quantize

RESULTS = sorted(result.FOLDER.glob("*.json"))
each = pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)


def test_the_page_is_made_of_the_results() -> None:
    assert tables.PAGE.read_text(encoding="utf-8") == tables.render(), "run `python -m benchmarks.tables`"


def test_the_page_of_faults_is_made_of_its_result() -> None:
    found = json.loads(faults.RESULT.read_text(encoding="utf-8"))
    assert faults.PAGE.read_text(encoding="utf-8") == faults.render(found), "run `python -m benchmarks.faults --page`"


def test_the_table_of_chat_templates_is_made_of_its_result() -> None:
    found = json.loads((result.FOLDER / "chat_templates.json").read_text(encoding="utf-8"))["rows"]
    assert chat_templates.table(found) in chat_templates.PAGE.read_text(encoding="utf-8")
    assert len({row["template"].partition(",")[0] for row in found}) >= 40
    assert all(row["as_by_hand"] for row in found)


@each
def test_a_result_has_the_shape_of_all(file: Path) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    assert set(data) == {"benchmark", "date", "hardware", "versions", "command", "rows", "notes"}
    assert data["benchmark"] == file.stem
    assert set(data["hardware"]) >= {"cpu", "cores_used", "memory_gb", "gpu", "os"}
    assert data["rows"]
    assert data["command"].startswith("python -m benchmarks.")


@each
def test_a_result_names_no_place_of_the_machine_it_was_made_on(file: Path) -> None:
    assert re.findall(r"(?<![\w.])/(?:\w[\w.-]*/)+", file.read_text(encoding="utf-8")) == []


def test_recipes_of_benchmarks_are_recipes() -> None:
    files = sorted((Path(result.__file__).parent / "recipes").glob("*.yaml"))
    assert [Recipe.load(file).name for file in files] == [file.stem for file in files] != []


def _write(folder: Path, name: str, rows: list[dict], notes: list[str]) -> None:
    machine = {"cpu": "a CPU", "cores_used": "1 of 2", "memory_gb": 8, "gpu": None, "os": "an OS"}
    command = f"python -m benchmarks.{name}"
    result.write(name, command=command, hardware=machine, versions={}, rows=rows, notes=notes, folder=folder)


def test_a_result_without_words_shows_all_its_rows(tmp_path: Path) -> None:
    rows = [
        {"table": "first", "loss": "a", "seconds": 0.12345},
        {"table": "second", "loss": "b", "bytes": 123456, "each": [1, 2]},
    ]
    _write(tmp_path, "something_else", rows, ["measured twice"])
    page = tables.render(tmp_path)
    assert "## Something else" in page
    assert "**first**\n\n| loss | seconds |\n| --- | ---: |\n| a | 0.123 |\n" in page
    assert "**second**\n\n| loss | bytes |\n| --- | ---: |\n| b | 123,456 |\n" in page
    assert "- measured twice\n" in page
    assert "by `python -m benchmarks.something_else` on a CPU, 1 of 2 cores, 8 GB, an OS" in page


def test_words_beside_a_result_take_their_figures_from_it(tmp_path: Path) -> None:
    words = '## Title\n\nIt took {{ value(rows, "s", loss="a") }} s.\n\n{{ table(rows, columns={"loss": "which"}) }}\n'
    (tmp_path / "timed.md.jinja").write_text(words, encoding="utf-8")
    _write(tmp_path, "timed", [{"loss": "a", "s": 2.0}], [])
    assert "## Title\n\nIt took 2.00 s.\n\n| which |\n| --- |\n| a |\n" in tables.render(tmp_path)
    _write(tmp_path, "timed", [{"loss": "a", "s": 2.0}, {"loss": "a", "s": 3.0}], [])
    with pytest.raises(LookupError, match="s: 2 rows have"):
        tables.render(tmp_path)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (17.0, "17.0"),
        (0.03856, "0.0386"),
        (1234.5, "1,234"),
        (0.0, "0"),
        (123456, "123,456"),
        (None, "-"),
        ("a|b", "a\\|b"),
        (result.spread([2.0]), "2.00"),
        (result.spread([20.0, 21.0, 22.0]), "21.0 ± 1.0"),
        (result.spread([0.5, 0.5, 0.5]), "0.5000 ± 0.0000"),
    ],
)
def test_figures_as_people_read_them(entry: object, text: str) -> None:
    assert tables.cell(entry) == text


def test_every_loss_is_compared_by_a_recipe_that_is_valid(tmp_path: Path) -> None:
    compared = losses.variants()
    kinds = {item["kind"] for stage in compared.values() for item in stage.get("losses", [])}
    of_values = {kind for kind in LOSSES if LOSSES[kind].compares == "values"}  # of encoders' tasks, not of next tokens
    assert kinds == set(LOSSES) - of_values
    for name, stage in compared.items():
        cell = losses.cell(name, stage, tmp_path, num_tokens=4096, lr=1e-3, folder="seed-0", seed=0)
        data = books.data(tmp_path, "test")
        recipe = {"name": "losses", "teacher": str(tmp_path), "data": data, "stages": cell.stages}
        assert Recipe.from_text(yaml.safe_dump(recipe, sort_keys=False)).stages["student"].steps(256) == 2


def test_the_search_goes_on_past_its_edges() -> None:
    found: dict[float, float] = {}
    while (lr := losses.next_rate(found)) is not None:
        found[lr] = abs(lr - 9e-3)
    assert list(found) == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    found = {}
    while (lr := losses.next_rate(found)) is not None:
        found[lr] = lr if lr > 3e-4 else 1
    assert min(found, key=found.__getitem__) == 5e-4
    found = {}
    while (lr := losses.next_rate(found)) is not None:
        found[lr] = lr
    assert min(found) == 1e-3 / 16


def test_losses_are_held_against_the_control_of_their_own_seed() -> None:
    def of(*perplexities: float) -> list[dict[str, float]]:
        return [{"perplexity": p, "kl_to_teacher": 1.0, "top1_agreement": 0.5} for p in perplexities]

    start = {"teacher": {**of(10.0)[0], "parameters": 7, "non_embedding_parameters": 5}}
    searched = {"cross_entropy": {1e-3: 2.0}, "forward_kl": {1e-3: 2.0, 2e-3: 1.0}, "reverse_kl": {}}
    rates = {"cross_entropy": 1e-3, "forward_kl": 2e-3, "reverse_kl": 1e-3}
    trained = {"cross_entropy": of(20.0, 40.0), "forward_kl": of(10.0), "reverse_kl": []}
    rows = losses.rows(start, searched, rates, trained)
    compared = [row for row in rows if row["table"] == "losses"]
    assert [(row["loss"], row["seeds"]) for row in compared] == [("forward_kl", 1), ("cross_entropy", 2)]
    assert compared[0]["to_control"]["values"] == [0.5]
    assert compared[1]["to_control"] is None
    assert {"table": "search", "loss": "cross_entropy", "0.001": 2.0, "0.002": None} in rows


def test_a_finished_cell_is_not_run_again_until_what_it_is_made_of_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Path] = []

    def run(recipe: Recipe, run_dir: Path, say: Callable[[str], None]) -> Run:
        ran.append(run_dir)
        row = Row("student", perplexity=float(len(ran)), kl_to_teacher=1.0, top1_agreement=0.5)
        write_text(run_dir / "evaluate" / "rows.json", to_json([row]))
        return Run(run_dir)

    monkeypatch.setattr("distill.run", run, raising=False)
    teacher = tmp_path / "teacher"
    write_text(teacher / "config.json", "{}")
    one = matrix.Matrix(tmp_path / "work", teacher, books.data(tmp_path, "test"), say=lambda line: None)
    stages = {"evaluate": {"models": ["teacher"]}}
    assert [one.run(matrix.Cell("a/seed-0", stages))["student"]["perplexity"] for _ in range(2)] == [1.0, 1.0]
    one.run(matrix.Cell("a/seed-1", stages, seed=1))
    assert ran == [tmp_path / "work" / "a" / "seed-0", tmp_path / "work" / "a" / "seed-1"]
    assert (ran[0] / "data").resolve() == (ran[1] / "data").resolve()
    write_text(teacher / "config.json", '{"another": "model"}')
    assert one.run(matrix.Cell("a/seed-0", stages))["student"]["perplexity"] == 3.0


BOOKS_TEACHER = yaml.safe_load(books.RECIPE.read_text(encoding="utf-8"))["stages"]["finetune"]["model"]["config"]


@pytest.mark.parametrize("share", pruning_cuts.SHAPES)
def test_every_cut_is_a_valid_recipe_that_keeps_the_share(share: int, tmp_path: Path) -> None:
    config = {"vocab_size": 4096, "head_dim": 32, **BOOKS_TEACHER}
    layout = layout_for("llama")

    def outside_embeddings(config: dict) -> int:
        return layout.count(config) - config["vocab_size"] * config["hidden_size"]  # they are tied

    stages = {pruning_cuts.stage_name(name): stage for name, stage in pruning_cuts.cuts(share).items()}
    text = {"name": "pruning", "teacher": str(tmp_path), "data": books.data(tmp_path, "test"), "stages": stages}
    for name, stage in Recipe.from_text(yaml.safe_dump(text, sort_keys=False)).stages.items():
        sizes = target_sizes(stage.keep, config, layout)  # type: ignore[attr-defined]
        keys = {"hidden_size": "hidden_channels", "intermediate_size": "mlp_neurons"}
        keys |= {"num_attention_heads": "attention_heads", "num_hidden_layers": "layers"}
        cut = config | {key: sizes[axis] for key, axis in keys.items()}
        kept = outside_embeddings(cut) / outside_embeddings(config)
        assert kept == pytest.approx(share / 100, abs=0.01), name


def test_every_criterion_is_compared_and_training_starts_from_cuts() -> None:
    kinds = {
        stage[key]["kind"]
        for share in pruning_cuts.SHAPES
        for stage in pruning_cuts.cuts(share).values()
        for key in ("criterion", "mlp_criterion", "depth_criterion")
        if key in stage
    }
    assert kinds == set(CRITERIA)
    for share in pruning_cuts.SHAPES:
        told = [pruning_cuts.telling(share, seed) | pruning_cuts.others(share, seed) for seed in range(3)]
        starts = {start for ways in told for starts in ways.values() for start in starts}
        made = {*pruning_cuts.cuts(share), pruning_cuts.SOLVED, *pruning_cuts.SEARCHES, pruning_cuts.EVEN}
        assert starts <= made
        assert {pruning_cuts.START, pruning_cuts.SOLVED, *pruning_cuts.SEARCHES, "width random 2"} <= starts


@pytest.mark.parametrize("share", pruning_cuts.SHAPES)
def test_what_is_solved_and_searched_is_a_recipe_that_is_valid(share: int, tmp_path: Path) -> None:
    training = {"num_tokens": 4096, "batch_size": 8}
    searches = {
        pruning_cuts.stage_name(name): pruning_cuts.search(name, 10**6, training) for name in pruning_cuts.SEARCHES
    }
    stages = {"solved": pruning_cuts.solved(share), **searches}
    recipe = {"name": "pruning", "teacher": str(tmp_path), "data": books.data(tmp_path, "test"), "stages": stages}
    assert list(Recipe.from_text(yaml.safe_dump(recipe, sort_keys=False)).stages) == list(stages)


def test_cuts_by_chance_are_one_row_and_the_best_comes_first() -> None:
    def of(perplexity: float) -> dict[str, float]:
        return {"perplexity": perplexity, "kl_to_teacher": 1.0, "top1_agreement": 0.5, "non_embedding_parameters": 7}

    cut = {50: {"width random 0": of(40.0), "width random 1": of(60.0), "mlp taylor": of(20.0), "teacher": of(10.0)}}
    rows = list(pruning.cut_rows(cut))
    assert [row["cut"] for row in rows] == ["teacher", "mlp taylor", "width random"]
    assert rows[2]["perplexity"]["values"] == [40.0, 60.0]


def test_what_peers_left_is_read_back(tmp_path: Path) -> None:
    place = tmp_path / "pruning" / "peers"
    for name, outcome in (("made", "7 parameters"), ("failed", "KeyError: 'x'")):
        record = {"name": name, "share": 50, "outcome": outcome}
        write_text(place / f"50-{name}" / pruning_peers.RECORD, json.dumps(record))
    write_text(place / "50-made" / "model" / "config.json", "{}")
    peers = pruning_peers.found(tmp_path)
    assert [(peer.name, peer.folder) for peer in peers] == [("failed", None), ("made", place / "50-made" / "model")]
    assert next(iter(pruning.peer_rows(peers)))["outcome"] == "KeyError: 'x'"


def test_scoring_is_held_against_the_passes_of_its_own_round() -> None:
    slow = dict.fromkeys(scoring.PASSES, (4.4, 9)) | {scoring.FORWARD: (4.0, 5), scoring.BACKWARD: (10.0, 5)}
    fast = dict.fromkeys(scoring.PASSES, (1.1, 8)) | {scoring.FORWARD: (1.0, 6), scoring.BACKWARD: (2.2, 5)}
    rows = {row["criterion"]: row for row in scoring.score_rows([slow, fast])}
    assert rows["activation"]["each_round"] == pytest.approx([1.1, 1.1])
    assert rows["taylor"]["each_round"] == pytest.approx([0.44, 0.5])
    assert rows["activation"]["peak_mb"] == 8e-6


def test_threads_are_compared_inside_a_round() -> None:
    speeds = {("alone", "PyTorch's default"): (100.0, 10.0, 1000.0), ("alone", "distill's"): (50.0, 20.0, 800.0)}
    machines = [(machine, choice) for machine in threads.MACHINES for choice in threads.CHOICES]
    measured = [(*one, speeds.get(one, (1.0, 1.0, 1.0))[i]) for i in range(3) for one in machines]
    rows = {(row["machine"], row["threads"]): row for row in threads._rows(measured)}
    assert rows.keys() == set(machines)
    ours = rows["alone", "distill's"]
    assert (ours["tokens_per_s"], ours["to_default"], ours["each_round"]) == (50, 0.8, [50, 20, 800])


def test_every_grid_is_rounded_and_trained_by_a_recipe_that_is_valid(tmp_path: Path) -> None:
    assert {grid.quantizer["kind"] for grid in GRIDS.values()} == {"int8_channel", "int_group", "ternary", "binary"}
    assert {grid.searched for grid in GRIDS.values()} | set(quantization_grids.SEARCHED.values()) <= {*GRIDS, *METHODS}
    ways = {(grid, way): keys for grid in GRIDS for way, keys in quantization_grids.rounded(GRIDS[grid]).items()}
    assert all((grid, quantization_grids.best(grid)) in ways for grid in GRIDS)
    start = str(tmp_path)
    stages = quantization.rounding(ways, start)
    for method in METHODS:
        if method not in quantization_grids.SEARCHED:
            longer = quantization_grids.longer(method, start)
            stages[f"longer-{len(stages)}"] = quantization.budgeted(longer, 4096, 1e-3)
        for grid in GRIDS:
            for scale in quantization_grids.scales(grid, method):
                stage = quantization_grids.trained(GRIDS[grid], scale, method, start)
                stages[f"trained-{len(stages)}"] = quantization.budgeted(stage, 4096, 1e-3)
    recipe = {"name": "quantization", "teacher": start, "data": books.data(tmp_path, "test"), "stages": stages}
    found = Recipe.from_text(yaml.safe_dump(recipe, sort_keys=False)).stages
    everywhere = len(METHODS) - len(quantization_grids.ONLY)
    held = sum(len(GRIDS[grid].scales) for grid in ("int4", "int3", "int2", "ternary"))
    some = 3 + held + len(GRIDS["int4"].scales)  # after gptq with learned scales; held; int4 with int8 activations
    assert sum("trained" in name for name in found) == everywhere * sum(len(g.scales) for g in GRIDS.values()) + some
    keep = quantization_grids.KEEP
    widths = (keep["hidden_size"], keep["intermediate_size"], keep["num_attention_heads"] * 32)
    for grid in [stage.quantizer for stage in found.values() if isinstance(stage, Quantize)]:
        assert all(grid.groups(width) for width in widths)


def test_what_training_recovers_is_counted_from_the_control_of_its_own_seed() -> None:
    def of(*losses: float) -> list[dict[str, float]]:
        return [{"loss_nats": loss} for loss in losses]

    full, nearest = of(2.0, 3.0), of(4.0, 4.0)
    controls = [{quantization.FULL: f, "int4, nearest": n} for f, n in zip(full, nearest, strict=True)]
    assert quantization.recovered(of(3.0, 3.0), controls, "int4, nearest")["values"] == [0.5, 1.0]
    no_gap = [{quantization.FULL: full[0], "int4, nearest": {"loss_nats": 2.0009}}]
    assert quantization.recovered(of(3.0), no_gap, "int4, nearest") is None
