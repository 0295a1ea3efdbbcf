"""Sentence encoders of every kind beside sentence-transformers, of random tiny checkpoints."""

import json

import numpy as np
import pytest
import torch
import transformers as hf
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import warpformer as wf

from .models.checkpoints import BART, BERT, DISTILBERT, GPT2, GROUPED, T5, random_model, tokenizer

TEXTS = ["The weather is lovely today.", "", "It's so sunny outside!", "words " * 40, "He drove away."]
MODELS = {  # name -> (class, config, pooling, what comes after it)
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**BERT), "cls", [Normalize()]),
    "distilbert": (hf.DistilBertModel, hf.DistilBertConfig(**DISTILBERT), "mean", []),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**GROUPED, head_dim=16), "lasttoken", [Normalize()]),
    "mistral": (hf.MistralModel, hf.MistralConfig(**GROUPED, sliding_window=7), "lasttoken", [Normalize()]),
    "gpt2": (hf.GPT2Model, hf.GPT2Config(**GPT2), "weightedmean", []),
    "sentence-t5": (
        hf.T5EncoderModel,
        hf.T5Config(**T5),
        "mean",
        [Dense(48, 32, bias=False, activation_function=torch.nn.Identity()), Normalize()],
    ),
    "t5 with a decoder": (hf.T5ForConditionalGeneration, hf.T5Config(**T5), "mean", [Dense(48, 20)]),
    "mt5": (hf.MT5EncoderModel, hf.MT5Config(**T5), "mean", [Normalize()]),
}


def save(name, folder):
    """The model of sentence-transformers, in `folder`."""
    cls, config, pooling, after = MODELS[name]
    config.pad_token_id = 1
    random_model(cls, config).save_pretrained(folder / "transformer")
    tokenizer(TEXTS, begins=pooling != "lasttoken").save_pretrained(folder / "transformer")
    modules = [Transformer(str(folder / "transformer")), Pooling(48, pooling), *after]
    model = SentenceTransformer(modules=modules, device="cpu").eval()
    model.save(str(folder / "model"))
    return model, folder / "model"


@pytest.mark.parametrize("name", MODELS)
def test_embeddings(name, tmp_path):
    theirs, folder = save(name, tmp_path)
    ours = wf.SentenceEncoder(folder)
    expected = theirs.encode(TEXTS, show_progress_bar=False)
    found = ours.encode(TEXTS)
    assert found.shape == expected.shape == (len(TEXTS), ours.get_embedding_dimension())
    np.testing.assert_allclose(found, expected, atol=2e-5 * abs(expected).max())
    for text, row in zip(TEXTS, found, strict=True):
        assert np.array_equal(ours.encode(text), row)
    ours.save(tmp_path / "again")
    assert np.array_equal(wf.SentenceEncoder(tmp_path / "again").encode(TEXTS), found)
    read = SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(read, expected, atol=2e-5 * abs(expected).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_features": 31}, r"'linear.weight' of \[31, 48\] floats is torch.float32 \[32, 48\]"),
        ({"bias": True}, "'linear.bias' of .* is missing"),
        ({"activation_function": "os.system"}, "activation_function = 'system' is none of"),
        ({"use_residual": True}, "use_residual"),
        ({"module_input_name": "token_embeddings"}, "names of inputs"),
    ],
)
def test_damaged_dense(tmp_path, changes, message):
    _, folder = save("sentence-t5", tmp_path)
    path = folder / "2_Dense/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(wf.CheckpointError, match=message):
        wf.SentenceEncoder(folder)


def test_pickled_dense(tmp_path):
    _, folder = save("sentence-t5", tmp_path)
    (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"2_Dense/model\.safetensors is missing .*never read"):
        wf.SentenceEncoder(folder)


def test_what_is_no_encoder(tmp_path):
    random_model(hf.BartModel, hf.BartConfig(**BART)).save_pretrained(tmp_path)
    tokenizer(TEXTS).save_pretrained(tmp_path)
    with pytest.raises(wf.CheckpointError, match="bart has no encoder of its own"):
        wf.SentenceEncoder(tmp_path)
