"""Tiny models on disk, made once."""

from __future__ import annotations

import base64
import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def pytest_collection_finish() -> None:
    """Keep what was imported out of the garbage collections that every stage of a run asks for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _the_same_numbers() -> None:
    """torch seeds every process anew; a test that draws without a generator would pass on some days only."""
    torch.manual_seed(7919)  # as no generator of a test, or two draws would be the same numbers


@pytest.fixture(autouse=True)
def _installed_by_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name the command that adds an extra, which depends on how distill was installed."""
    monkeypatch.setattr("distill.core.installed._found", lambda: None)


@pytest.fixture(autouse=True)
def _plots_are_drawn_and_not_saved(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """To lay out and encode plots takes a third of a small run; tests marked ``plots`` look at them as they are."""
    if request.node.get_closest_marker("plots") is None:
        monkeypatch.setattr("distill.reporting.plots._save", lambda figure, form: _BLANK[form])


_BLANK = {
    "svg": b'<svg viewBox="0 0 1 1"></svg>',
    "png": base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
    ),
}


@pytest.fixture
def as_on_a_terminal() -> Iterator[None]:
    """Hear the signals that a process which was started in the background ignores, as distill would too."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two model folders, 2 layers and 1 layer, with the same byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folders = []
    for layers in (2, 1):
        torch.manual_seed(layers)
        config = LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=layers == 1, eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp(f"layers_{layers}")
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        folders.append(folder)
    return folders
