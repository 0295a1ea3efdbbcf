"""BERT and its relatives give transformers' outputs, with every head."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

import warpformer as wf

from .checkpoints import ENCODERS, padded_batch, positions, random_model, same, tokenizer

HEADS = [
    "Model",
    "ForMaskedLM",
    "ForPreTraining",
    "ForNextSentencePrediction",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
]
CASES = [
    (name, head)
    for name, (architecture, _) in ENCODERS.items()
    for head in HEADS
    if hasattr(transformers, architecture + head)
]


def make(name, head, folder):
    architecture, config = ENCODERS[name]
    labels = {} if head == "ForQuestionAnswering" else {"num_labels": 3}
    config = type(config).from_dict(config.to_dict() | labels)
    model = random_model(getattr(transformers, architecture + head), config)
    model.save_pretrained(folder)
    return model


def inputs(name):
    ids, mask = padded_batch()
    types = {} if name == "distilbert" else {"token_type_ids": (ids % 2).roll(1, 1)}
    places = positions(mask) + (2 if name == "roberta" else 0)
    return dict(input_ids=ids, attention_mask=mask) | types, places


@pytest.mark.parametrize(("name", "head"), CASES)
@torch.no_grad()
def test_outputs(name, head, tmp_path):
    theirs = make(name, head, tmp_path / "theirs")
    given, places = inputs(name)
    kept = given["attention_mask"].bool()
    found = wf.load(tmp_path / "theirs")(**given)
    expected = theirs(**given, position_ids=places).to_tuple()
    for ours, other in zip(found if isinstance(found, tuple) else [found], expected, strict=False):
        if ours is None:
            continue
        if ours.shape[:2] == kept.shape:
            same(ours[kept], other[kept], 2e-4)
        else:  # theirs looks at the first column of a row, which is padding in the last
            same(ours[:2], other[:2], 2e-4)


@pytest.mark.parametrize(("name", "head"), CASES)
@torch.no_grad()
def test_save_writes_what_transformers_wrote(name, head, tmp_path):
    make(name, head, tmp_path / "theirs")
    model = wf.load(tmp_path / "theirs")
    wf.save(model, tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_left_padding_changes_nothing(name, tmp_path):
    make(name, "ForSequenceClassification", tmp_path)
    model = wf.load(tmp_path)
    ids, mask = padded_batch()
    together = model(ids, mask)
    for row, kept in enumerate(mask.bool()):
        assert torch.equal(model(ids[row, kept][None])[0], together[row])


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_bfloat16(name, tmp_path):
    theirs = make(name, "ForMaskedLM", tmp_path)
    given, places = inputs(name)
    kept = given["attention_mask"].bool()
    exact = theirs(**given, position_ids=places).logits[kept]
    same(wf.load(tmp_path, dtype=torch.bfloat16)(**given)[kept], exact, 2e-2)


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients(name, tmp_path):
    theirs = make(name, "ForMaskedLM", tmp_path)
    given, places = inputs(name)
    kept = given["attention_mask"].bool()
    ours = wf.load(tmp_path, trainable=True).eval()
    for logits in (theirs(**given, position_ids=places).logits, ours(**given)):
        torch.nn.functional.cross_entropy(logits[kept], given["input_ids"][kept]).backward()
    same(ours.backbone.tokens.weight.grad, theirs.get_input_embeddings().weight.grad, 1e-4)
    same(
        ours.lm.dense.weight.grad,
        [
            p.grad
            for n, p in theirs.named_parameters()
            if "dense.weight" in n or "vocab_transform.weight" in n
        ][-1],
        1e-4,
    )


@torch.no_grad()
def test_inputs_embeds(tmp_path):
    make("bert", "Model", tmp_path)
    model = wf.load(tmp_path)
    ids, mask = padded_batch()
    found = model(inputs_embeds=model.tokens(ids), attention_mask=mask).last_hidden_state
    same(found, model(ids, mask).last_hidden_state, 1e-6)
    with pytest.raises(wf.InputError, match="one of input_ids and inputs_embeds"):
        model(attention_mask=mask)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_masked_words_are_filled_as_by_the_pipeline(name, tmp_path):
    theirs = make(name, "ForMaskedLM", tmp_path)
    words = tokenizer(["It is so sunny outside", "He drove away"])
    pipeline = transformers.pipeline("fill-mask", model=theirs, tokenizer=words, top_k=5)
    model = wf.load(tmp_path)
    for text in ("It is <mask> sunny", "He <mask> away outside", "<mask>"):
        ids = words(text, return_tensors="pt").input_ids
        masked = model(ids)[0, ids[0] == words.mask_token_id].softmax(-1)
        scores, tokens = masked.flatten().topk(5)
        expected = pipeline(text)
        assert tokens.tolist() == [each["token"] for each in expected]
        torch.testing.assert_close(scores, torch.tensor([each["score"] for each in expected]))
