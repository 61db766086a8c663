import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from markdown_it import MarkdownIt
from pydantic import ValidationError

from distill.core.artifact import Lineage
from distill.core.errors import DistillError, InputError
from distill.exporters import CardFacts, HuggingFace, VerifyResult
from distill.exporters.model_card import markdown_table, public_name, write_card
from distill.exporters.upload import planned, upload
from distill.stages.export import Export

LINEAGE = Lineage(
    stage="small", kind="distill", parent="/home/someone/pruned", teacher="teacher", base_model="some-team/Base-1B",
    licence="apache-2.0", input_hash="0123456789abcdef",
)  # fmt: skip
VERIFIED = VerifyResult(
    tokens=16, max_abs_logit=1e-5, mean_abs_logit=1e-6, kl=2e-9, worst_kl=3e-9, top1_agreement=1.0, weight_bytes=1234
)


FACTS = CardFacts(library="transformers", tags=(), how_to_load="call from_pretrained")


def test_metadata_and_text(tmp_path: Path) -> None:
    write_card(
        tmp_path,
        title="small",
        facts=FACTS,
        engine="plain transformers",
        lineage=LINEAGE,
        notes=["layers: 14 as F16"],
        rows=[{"model": "small", "perplexity": 8.123456}],
        verified=VERIFIED,
    )
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "some-team/Base-1B"
    assert data["base_model_relation"] == "finetune"
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert card.text.startswith("# small") or card.text.lstrip().startswith("# small")
    assert "| small | 8.123 |" in card.text
    assert "- layers: 14 as F16" in card.text
    assert "Loaded in plain transformers and compared" in card.text
    assert "on 16 tokens: KL 2e-09" in card.text
    assert "/home/someone" not in card.text
    assert "made from: pruned, by stage small (distill)" in card.text


def test_metadata_tells_how_it_was_made_and_of_what(tmp_path: Path) -> None:
    write_card(
        tmp_path,
        title="small",
        facts=FACTS,
        engine="plain transformers",
        lineage=None,
        rows=[{"model": "small", "Perplexity": "8.1"}],
        base_model="some-team/Base-1B",
        kinds=["quantize", "distill", "prune"],
        datasets=["who/texts", str(tmp_path), "data/../x"],
    )
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["tags"] == ["distillation", "quantized", "pruned"]
    assert data["datasets"] == ["who/texts"]
    assert data["metrics"] == ["perplexity"]
    assert (data["base_model"], data["base_model_relation"]) == ("some-team/Base-1B", "finetune")


def test_an_upload_is_planned_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has no model card"):
        planned(tmp_path, "org/name")
    write_card(tmp_path, title="small", facts=FACTS, engine="transformers", lineage=LINEAGE)
    (tmp_path / "model.safetensors").write_bytes(b"0" * 2_000_000)
    first, *files = planned(tmp_path, "org/name")
    assert first.startswith("to org/name on the Hub, private: 2 files, 2.0")
    assert files[1] == "model.safetensors (2.00 MB)"
    with pytest.raises(ValidationError, match="upload has no effect without push_to_hub"):
        Export(model="a", upload=True)
    with pytest.raises(ValidationError, match="push_to_hub"):
        Export(model="a", push_to_hub="no-slash")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DistillError, match="push_to_hub: org/name: "):
        upload(tmp_path, "org/name")


def test_a_new_repository_is_private_and_all_files_are_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **named: asked.append((name, named)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **named: asked.append(named) or "https://the-commit")
    assert upload(tmp_path, "org/name") == "https://the-commit"
    created, sent = asked
    assert created == ("org/name", {"private": True, "exist_ok": True})
    assert (sent["repo_id"], sent["folder_path"]) == ("org/name", tmp_path)


def test_quantized_models_say_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"format": "pack-quantized"}}'
    )
    facts = HuggingFace().card(tmp_path)
    write_card(tmp_path, title="small", facts=facts, engine="transformers", lineage=LINEAGE)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert "compressed-tensors" in card.data.to_dict()["tags"]
    assert "pack-quantized format" in card.text


def test_what_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    unknown = replace(LINEAGE, licence=None, base_model="/models/base")
    write_card(tmp_path, title="small", facts=FACTS, engine="transformers", lineage=unknown)
    card = ModelCard.load(tmp_path / "README.md")
    assert not {"license", "base_model", "base_model_relation"} & set(card.data.to_dict())
    assert "licence: unknown - check the base model before you publish" in card.text
    assert "base model: base" in card.text
    assert "was not verified: it has not been compared with the trained model." in card.text
    assert "Nothing was measured" in card.text
    write_card(tmp_path, title="small", facts=FACTS, engine="transformers", lineage=None, verified="no engine here")
    text = (tmp_path / "README.md").read_text()
    assert "was not verified: no engine here." in text
    assert "base model: not recorded" in text


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


EVIL = "<script>alert(1)</script> [x](javascript:alert(1)) **y** | z\n\n# heading\n---\nlicense: mit\n```"


def test_nothing_from_outside_is_rendered(tmp_path: Path) -> None:
    """A licence, a path, a mask or a row's name may be anybody's words."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"format": EVIL}}))
    lineage = Lineage(EVIL, EVIL, EVIL, EVIL, EVIL, EVIL, EVIL, mask=EVIL)
    facts = HuggingFace().card(tmp_path)
    rows, notes = [{"model": EVIL, EVIL: EVIL}], ["`-k q8_0` <script>x</script>\n---\n# y"]
    for verified in (EVIL, VERIFIED):
        write_card(
            tmp_path,
            title=EVIL,
            facts=facts,
            engine="x",
            lineage=lineage,
            notes=notes,
            rows=rows,
            verified=verified,
        )
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.to_dict()["license"] == " ".join(EVIL.split())
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)
        inline = [child.type for token in tokens for child in token.children or []]
        assert {token.type for token in tokens} & {"html_block", "hr"} == set()
        assert set(inline) <= {"text", "text_special", "softbreak", "code_inline"}
        (code,) = [token.content for token in tokens if token.type == "fence"]
        assert f"```python\n{code}```" in facts.how_to_load
