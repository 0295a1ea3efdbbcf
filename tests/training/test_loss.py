"""What all objectives have in common, on a small model of each."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.training.models import OBJECTIVES, make_model, make_objective
from warpformer import InputError
from warpformer.models import transformer
from warpformer.nn.embedding import sinusoidal_positions
from warpformer.training import Batches, CausalLM, MaskedLM, Seq2Seq


@pytest.fixture(params=OBJECTIVES, ids=lambda cls: cls.__name__)
def objective(request, pairs, english, tokenizer):
    return make_objective(request.param, pairs, english, tokenizer, seed=3, label_smoothing=0.1)


def relative_error(ours, theirs):
    return (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()


def test_example_is_a_function_of_seed_epoch_and_index(objective, pairs, english, tokenizer):
    again = make_objective(type(objective), pairs, english, tokenizer, seed=3)
    first = [objective.example(index, 1) for index in (5, 0, 7)]
    again.example(1, 0)
    for index, example in ((7, first[2]), (5, first[0])):
        for name, value in again.example(index, 1).items():
            np.testing.assert_array_equal(value, example[name])


def test_epochs_and_seeds_differ(objective, pairs, english, tokenizer):
    other = make_objective(type(objective), pairs, english, tokenizer, seed=4)
    has_noise = not isinstance(objective, CausalLM | Seq2Seq)
    for example in (objective.example(5, 2), other.example(5, 1)):
        same = [np.array_equal(value, example[name]) for name, value in objective.example(5, 1).items()]
        assert all(same) != has_noise


def test_lengths_bound_what_is_read(objective):
    for index, length in enumerate(objective.lengths()[:60]):
        for epoch in range(3):
            batch = objective.batch([index], epoch)
            assert batch.tokens <= length
            assert batch.inputs["input_ids"].shape[1] <= objective.max_length
            assert batch.targets == len(batch.labels)


def test_loss_is_the_weighted_mean_of_examples(objective, tokenizer):
    model = make_model(objective, tokenizer)
    indices = [3, 0, 11, 6, 9]
    batch = objective.batch(indices, 0)
    alone = [objective.batch([index], 0) for index in indices]
    with torch.no_grad():
        losses = [objective.loss(model, single).double() * single.targets for single in alone]
        loss = objective.loss(model, batch)
    assert sum(single.targets for single in alone) == batch.targets
    torch.testing.assert_close(loss.double(), sum(losses) / batch.targets, rtol=1e-6, atol=0)


def reference(objective, model, batch):
    """The loss of padded logits, by torch."""
    logits = model(**batch.inputs)
    smoothing = dict(label_smoothing=objective.label_smoothing)
    if not isinstance(objective, MaskedLM):
        there = batch.inputs.get("decoder_attention_mask", batch.inputs["attention_mask"])
        return F.cross_entropy(logits[there], batch.labels, **smoothing)
    logits, follows = logits
    masked = F.cross_entropy(logits[batch.inputs["attention_mask"]][batch.places], batch.labels, **smoothing)
    return masked + (F.cross_entropy(follows, batch.pairs, reduction="none") * batch.shares).sum()


def test_gradients(objective, tokenizer):
    model = make_model(objective, tokenizer)
    batch = objective.batch(range(6), 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = objective.loss(model, batch), reference(objective, model, batch)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, theirs)]
    largest = max(theirs.abs().max() for theirs in gradients[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * largest.item())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_few_steps_lower_the_loss(objective, tokenizer, autocast):
    model = make_model(objective, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch, losses = objective.batch(range(4), 0), []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = objective.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert loss.dtype is torch.float32
    assert losses[-1] < losses[0] - 0.5


def test_to_a_device(objective):
    batch = objective.batch(range(3), 0)
    moved = batch.to("meta")
    assert type(moved) is type(batch)
    assert moved.targets == batch.targets
    assert {tensor.device.type for tensor in (moved.labels, *moved.inputs.values())} == {"meta"}


def test_columns_are_those_of_the_objective(objective, pairs, english, tokenizer):
    texts = english if isinstance(objective, Seq2Seq) else pairs
    with pytest.raises(InputError, match="columns"):
        type(objective)(texts, tokenizer, max_length=64)
    with pytest.raises(InputError, match="seed"):
        make_objective(type(objective), pairs, english, tokenizer, seed=-1)


class TorchTransformer(nn.Module):
    """The Transformer of torch.nn."""

    def __init__(self, config):
        super().__init__()
        sizes = (config.d_model, config.encoder_attention_heads, config.encoder_layers, config.decoder_layers)
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.transformer = nn.Transformer(*sizes, config.encoder_ffn_dim, 0.0, batch_first=True)
        self.register_buffer("positions", sinusoidal_positions(config.max_length, config.d_model))

    def embed(self, ids):
        x = self.tokens(ids) * self.tokens.embedding_dim**0.5
        return x + self.positions[: ids.shape[1]]

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        causal = nn.Transformer.generate_square_subsequent_mask(decoder_input_ids.shape[1]) < 0
        hidden = self.transformer(
            self.embed(input_ids),
            self.embed(decoder_input_ids),
            tgt_mask=causal,
            src_key_padding_mask=~attention_mask,
            tgt_key_padding_mask=~decoder_attention_mask,
            memory_key_padding_mask=~attention_mask,
        )
        return F.linear(hidden[decoder_attention_mask], self.tokens.weight)


def test_gradients_are_those_of_torch_nn(pairs, tokenizer):
    objective = Seq2Seq(pairs, tokenizer, max_length=128, label_smoothing=0.1)
    sizes = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
    config = transformer.Config(vocab_size=600, dropout=0.0, final_norm=True, **sizes, **heads)
    model = transformer.ConditionalGeneration(transformer.Model(config), config)
    theirs = TorchTransformer(config)
    transformer.load_torch_(model.backbone, theirs.transformer)
    model.backbone.tokens.load_state_dict(theirs.tokens.state_dict())
    batch = objective.batch(Batches(objective, 1500).epoch(0)[0], 0)
    ours = objective.loss(model, batch)
    loss = F.cross_entropy(theirs(**batch.inputs), batch.labels, label_smoothing=0.1)
    torch.testing.assert_close(ours, loss)
    ours.backward()
    loss.backward()
    expected, gradients = deepcopy(model), deepcopy(theirs.transformer)
    for parameter, own in zip(gradients.parameters(), theirs.transformer.parameters(), strict=True):
        parameter.data = own.grad
    transformer.load_torch_(expected.backbone, gradients)
    expected.backbone.tokens.weight.data = theirs.tokens.weight.grad
    for (name, parameter), value in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert relative_error(parameter.grad, value) < 1e-4 or value.abs().max() < 1e-6, name
