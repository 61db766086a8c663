from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from distill.core.artifact import fingerprint
from distill.core.errors import InputError, MachineError
from distill.data.tokenizer import load_tokenizer
from distill.exporters.compressed_tensors import save
from distill.models.configs import config_of
from distill.models.head import check_head, hidden_states
from distill.models.load import check_reachable, load_config, load_model, locate, new_config, new_model
from distill.models.size import measure_size
from distill.quantization import Int8Channel, IntGroup
from distill.quantization.base import QuantizerSpec
from distill.quantization.prepare import prepare

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)).eval()


@pytest.fixture
def folder(tmp_path: Path, model: LlamaForCausalLM) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(call: Callable[[], Any]) -> str:
    """The one line with which a call refuses."""
    with pytest.raises(InputError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_comes_back_whole(folder: Path, model: LlamaForCausalLM) -> None:
    loaded = load_model(str(folder))
    assert not loaded.training
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in loaded.state_dict().items())
    model.bfloat16().save_pretrained(folder)
    assert load_model(str(folder)).dtype == torch.bfloat16
    assert load_model(str(folder), dtype="float32").dtype == torch.float32
    assert load_config(str(folder)).hidden_size == 32


def test_missing_weights_are_refused(folder: Path) -> None:
    change_weights(folder, lambda weights: (weights.pop("model.norm.weight"), weights.pop("lm_head.weight")))
    line = refused(lambda: load_model(str(folder)))
    assert line == f"{folder}: the weights do not fit the config: lm_head.weight is missing and 1 more"


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(33)}))
    line = refused(lambda: load_model(str(folder)))
    assert line == f"{folder}: the weights do not fit the config: model.norm.weight has shape [33], expected [32]"


def test_what_is_no_model_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    for call in (load_model, load_config):
        assert refused(lambda call=call: call(str(tmp_path / "none"))) == f"{tmp_path / 'none'}: no such folder"
        assert "not a model folder (no config.json in it)" in refused(lambda call=call: call(str(tmp_path / "empty")))
    (folder / "config.json").write_text("{")
    assert refused(lambda: load_config(str(folder))).startswith(f"{folder / 'config.json'}: cannot be read as JSON (")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    assert "hidden_size is 'wide', expected a whole number" in refused(lambda: load_config(str(folder)))
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_thing"}))
    assert refused(lambda: load_model(str(folder))).startswith(f"{folder}: cannot load the config (")


def test_what_the_hub_does_not_give(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    def answer(error: Exception) -> None:
        def raises(url: str) -> None:
            assert url.endswith("/who/none/resolve/main/config.json")
            raise error

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", raises)

    response: Any = SimpleNamespace(headers={}, request=None)
    for error, line in (
        (
            OfflineModeIsEnabled("offline\nmode"),
            "not in the Hub's cache, and HF_HUB_OFFLINE is set",
        ),
        (ConnectionError("no route"), "the Hub cannot be reached; check the name and the network"),
        (
            HfHubHTTPError("401 Invalid credentials\nhere", response=response),
            "answered '401 Invalid credentials'; check",
        ),
        (
            RepositoryNotFoundError("401", response=response),
            "no such model on the Hub (or a private one); check",
        ),
        (RemoteEntryNotFoundError("404", response=response), "not a transformers model (no config.json on the Hub)"),
        (GatedRepoError("403", response=response), "accept its terms on its Hub page"),
    ):
        answer(error)
        assert line in refused(lambda: check_reachable("who/none"))
    assert "not a Hub id (expected OWNER/MODEL)" in refused(lambda: check_reachable("who/none/else"))
    check_reachable(str(folder))


def test_a_cut_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    line = refused(lambda: load_model(str(folder)))
    assert line == f"{weights}: begins with no whole header of safetensors; download or copy it again"


@pytest.mark.parametrize("change", [-1, 7])
def test_half_a_download_is_refused_by_its_length(folder: Path, change: int) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes((data + bytes(9))[: len(data) + change])
    line = f"{weights}: has {len(data) + change:,} bytes, expected {len(data):,} by its own header; download or copy it"
    for read in (load_config, load_model, fingerprint, config_of):
        assert refused(lambda read=read: read(str(folder))).startswith(line)


def test_pickled_weights_are_not_read(folder: Path, model: LlamaForCausalLM) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert refused(lambda: load_model(str(folder))).startswith(f"{folder}: cannot load the model (")


def test_code_in_a_model_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.F", "AutoModelForCausalLM": "foreign.F"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    refused(lambda: load_model(str(folder)))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_kernels_of_another_repository_are_not_run(key: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: "someone/kernels"}))
    for read in (load_config, load_model):
        assert refused(lambda read=read: read(str(folder))) == (
            f"{folder}: its config asks for code of someone/kernels, which is not run; remove it"
        )


@pytest.mark.parametrize("spec", [IntGroup(), Int8Channel()], ids=lambda spec: spec.kind)
def test_a_low_bit_artifact_loads_as_plain_layers(tmp_path: Path, model: LlamaForCausalLM, spec: QuantizerSpec) -> None:
    prepare(model, spec)
    save(model, tmp_path / "low", dtype=torch.float32)
    loaded = load_model(str(tmp_path / "low"), dtype="float32")
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(hidden_states(loaded, ids), hidden_states(model, ids))  # the body, before any forward
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    check_head(loaded)
    names = {name for name, _ in loaded.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}


def test_new_models_depend_on_the_seed_alone() -> None:
    config = LlamaConfig(**SIZES)

    def weights(seed: int) -> torch.Tensor:
        made: PreTrainedModel = new_model(config, seed=seed)
        assert made.dtype == torch.float32
        assert not made.training
        return torch.cat([p.detach().flatten() for p in made.parameters()])

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights(7), first)
    assert not torch.equal(weights(8), first)


def test_a_new_config() -> None:
    config = new_config({"model_type": "llama", **SIZES, "rope_theta": 5e5})
    assert isinstance(config, LlamaConfig)
    assert config.hidden_size == 32
    assert config.rope_parameters["rope_theta"] == 5e5
    capped = new_config({"model_type": "gemma2", "final_logit_softcapping": 30})  # as a recipe has 30.0
    assert type(capped.final_logit_softcapping) is float


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "llama", "hiden_size": 32}, "llama has no key 'hiden_size'; did you mean 'hidden_size'?"),
        ({"model_type": "lama"}, "no model_type 'lama'; did you mean 'llama'?"),
        ({"hidden_size": 32}, "model_type is missing"),
        ({"model_type": "llama", "zzz": 1}, "llama has no key 'zzz'"),
        ({"model_type": "llama", "hidden_size": 33, "num_attention_heads": 2}, "llama rejects the values"),
        (
            {"model_type": "llama", "hidden_size": "wide"},
            "hidden_size is 'wide', expected a whole number",
        ),
        ({"model_type": "llama", "rms_norm_eps": "small"}, "llama rejects the values"),
    ],
)
def test_a_wrong_config_is_one_line(keys: dict[str, Any], message: str) -> None:
    assert message in refused(lambda: new_config(keys))


def test_a_model_beyond_all_memory_is_refused_before_it_is_made(folder: Path) -> None:
    huge = {"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 64}
    with pytest.raises(MachineError, match=r"^llama: 1\.06e\+15 parameters need 4,222,126 GB of memory, and"):
        new_model(new_config({"model_type": "llama", **SIZES, **huge}), seed=0)
    with pytest.raises(MachineError, match=r"^mpt: .* parameters need [\d,]{5,} GB of memory"):  # it has no layout
        new_model(new_config({"model_type": "mpt", "d_model": 1 << 18, "n_layers": 8}), seed=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | huge))
    with pytest.raises(MachineError, match=f"^{folder}: 8.44e\\+14 parameters need 3,377,727 GB"):
        load_model(str(folder))


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma2"])
def test_a_thousand_million_layers_are_refused(kind: str, folder: Path) -> None:
    """Configs of some architectures make a list with an entry for each."""
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "num_hidden_layers": 10**9}))
    line = f"{folder / 'config.json'}: num_hidden_layers is 1000000000, expected a whole number up to 4,096"
    for read in (load_config, load_model, config_of, load_tokenizer, measure_size):
        assert refused(lambda read=read: read(str(folder))) == line
    assert "config: num_hidden_layers is" in refused(
        lambda: new_config({"model_type": kind, "num_hidden_layers": 10**9})
    )


def test_references() -> None:
    assert locate("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert "no such built-in model" in refused(lambda: locate("builtin:no-such-model"))


def test_a_folder_stays_itself(folder: Path) -> None:
    assert locate(str(folder)) == str(folder)
    assert locate(str(folder.parent)) == str(folder)  # that of a stage, which has its model in "model"


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_an_encoder_is_no_causal_model(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert f"{kind} is an encoder, which predicts masked tokens" in refused(lambda: load_model(str(tmp_path)))
