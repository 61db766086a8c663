from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from distill.core.artifact import Lineage
from distill.exporters import VerifyResult
from distill.exporters.model_card import markdown_table, public_name, write_card

LINEAGE = Lineage(
    stage="small", kind="distill", parent="/home/someone/pruned", teacher="teacher", base_model="some-team/Base-1B",
    licence="apache-2.0", input_hash="0123456789abcdef",
)  # fmt: skip
VERIFIED = VerifyResult(
    tokens=16, max_abs_logit=1e-5, mean_abs_logit=1e-6, kl=2e-9, worst_kl=3e-9, top1_agreement=1.0, weight_bytes=1234
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_metadata_and_text(folder: Path) -> None:
    write_card(
        folder, title="small", lineage=LINEAGE, rows=[{"model": "small", "perplexity": 8.123456}], verified=VERIFIED
    )
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "some-team/Base-1B"
    assert data["base_model_relation"] == "finetune"
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert card.text.startswith("# small") or card.text.lstrip().startswith("# small")
    assert "| small | 8.123 |" in card.text
    assert "on 16 tokens: KL 2e-09" in card.text
    assert "/home/someone" not in card.text
    assert "made from: pruned, by stage small (distill)" in card.text


def test_quantized_models_say_so(folder: Path) -> None:
    (folder / "config.json").write_text('{"quantization_config": {"format": "pack-quantized"}}')
    write_card(folder, title="small", lineage=LINEAGE)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert "pack-quantized format" in card.text


def test_what_is_not_known_is_not_guessed(folder: Path) -> None:
    write_card(folder, title="small", lineage=replace(LINEAGE, licence=None, base_model="/models/base"))
    card = ModelCard.load(folder / "README.md")
    assert not {"license", "base_model", "base_model_relation"} & set(card.data.to_dict())
    assert "licence: unknown - check the base model before you publish" in card.text
    assert "base model: base" in card.text
    assert "was not verified" in card.text
    assert "Nothing was measured" in card.text


def test_table_takes_ragged_rows() -> None:
    table = markdown_table([{"model": "a|b", "size": 3}, {"model": "c", "kl": 1.23456e-7}])
    assert table.splitlines() == [
        "| model | size | kl |",
        "| --- | --- | --- |",
        "| a\\|b | 3 | - |",
        "| c | - | 1.235e-07 |",
    ]


def test_public_name(tmp_path: Path) -> None:
    assert public_name("some-team/Base-1B") == "some-team/Base-1B"
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("teacher") == "teacher"
    assert public_name("builtin:tiny") == "builtin:tiny"
