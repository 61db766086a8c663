"""Which model the words of ``data.augment`` come from, and what is refused before anything is tokenized."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from distill.core.errors import InputError, RecipeError
from distill.data.spec import DataSpec
from distill.recipe import Recipe
from distill.stages.word_candidates import candidates_of
from distill.training.spec import ComputeSpec

WORDS = ["cat", "dog", "house", "tree", "run", "red"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of one layer with six words."""
    vocab = {token: id for id, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    special = {"mask_token": "[MASK]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def candidates(folder, kind):
    augment = {"replace_words": {"model": str(folder), "candidates": kind}}
    data = DataSpec.model_validate({"train": "python_docs", "sequence_length": 16, "augment": augment})
    return candidates_of(data, lambda reference: reference, ComputeSpec(accelerator="cpu"))


@pytest.mark.parametrize("kind", ["embeddings", "masked_lm"])
def test_an_encoder_on_disk_finds_words(encoder, kind):
    found = candidates(encoder, kind)
    ((cat, unknown),) = found.find(["Cat unknown"], [[(0, 3), (4, 11)]], 3)
    assert len(set(cat)) == 3
    assert set(cat) < set(WORDS) - {"cat"}
    assert len(unknown) == (3 if kind == "masked_lm" else 0)  # which is predicted from the words around alone
    again = candidates(encoder, kind)
    assert again.find(["Cat unknown"], [[(0, 3), (4, 11)]], 3) == [[cat, unknown]]
    assert again.identity() == found.identity()


def test_a_decoder_predicts_no_masked_words(tiny_folders):
    with pytest.raises(InputError, match=r"replace_words\.model: .* does not predict masked words; name an encoder"):
        candidates(tiny_folders[0], "masked_lm").find(["Cat"], [[(0, 3)]], 3)


def test_without_augment_no_model_is_asked():
    data = DataSpec.model_validate({"train": "python_docs", "sequence_length": 16})
    assert candidates_of(data, lambda reference: reference, ComputeSpec()) is None


@pytest.mark.parametrize(
    ("augment", "what"),
    [
        ("{}", "r:6: data.augment.replace_words.model: there is no teacher to take embeddings from"),
        ("{model: start}", "no folder or Hub id 'start' (a text is made before any stage runs)"),
        ("{model: nothing}", "no folder or Hub id 'nothing'"),
    ],
)
def test_a_model_that_nobody_has_is_refused(augment, what):
    text = f"""name: r
data:
  train: python_docs
  sequence_length: 16
  tokenizer: {{vocab_size: 300}}
  augment: {{replace_words: {augment}}}
stages:
  start: {{kind: finetune, model: {{config: {{model_type: llama}}}}, num_steps: 1, batch_size: 1}}
"""
    with pytest.raises(RecipeError) as refused:
        Recipe.from_text(text, "r")
    assert any(what in mistake for mistake in refused.value.mistakes), refused.value.mistakes
