"""KVCache.record_: calls of a model that are made again give what the calls themselves would, bit by bit."""

from unittest import mock

import numpy as np
import pytest
import torch
import transformers

import warpformer as wf
from tests.check import same_bits
from tests.models.checkpoints import DECODERS, SEQ2SEQ
from warpformer.nn import recorded_calls
from warpformer.nn.recorded_calls import RecordedCalls

from .models import prompts


class Pair:
    """Two caches of one model, of which the second records; `again` counts the calls that it made again."""

    def __init__(self, model, name, **options):
        self.model, self.again = model, 0
        self.caches = [model.make_cache(**options) for _ in range(2)]
        self.caches[1].record_()
        ids, mask = prompts(name)
        self.is_seq2seq = name in SEQ2SEQ
        if self.is_seq2seq:
            ids, mask = (ids, mask), ids[:, :1]
            self.call(*ids, decoder_input_ids=mask)
        else:
            self.call(ids, mask)

    def call(self, *args, **kwargs):
        counted = mock.patch.object(RecordedCalls, "again", self._counted(RecordedCalls.again))
        with torch.no_grad(), counted:
            expected, found = (self.model(*args, **kwargs, cache=cache) for cache in self.caches)
        assert same_bits(found, expected)
        assert self.caches[0].tokens.tolist() == self.caches[1].tokens.tolist()
        assert self.caches[0].longest == self.caches[1].longest

    def _counted(self, again):
        def call(*args):
            out = again(*args)
            self.again += out is not None
            return out

        return call

    def steps(self, count, tokens=1):
        """How many of them were made again."""
        before = self.again
        for _ in range(count):
            ids = torch.randint(3, 90, (len(self.caches[0]), tokens))
            self.call(**{"decoder_input_ids" if self.is_seq2seq else "input_ids": ids})
        return self.again - before

    def change(self, name, argument):
        for cache in self.caches:
            getattr(cache, name)(argument)


@pytest.fixture
def llama(models):
    return models("llama")[0]


@pytest.mark.parametrize("name", DECODERS | SEQ2SEQ)
def test_every_architecture(models, name):
    """Also when blocks are new, and when sequences leave, change their places or take tokens back."""
    pair = Pair(models(name)[0], name)
    assert pair.steps(20) == 19  # all but the one that is recorded
    pair.change("rewind_", [3, 0, 2])
    pair.change("reorder_", [1, 2, 0])
    assert pair.steps(3) == 3
    pair.change("reorder_", [1, 1])
    assert pair.steps(4) == 3
    assert pair.steps(4, tokens=3) == 3  # as of drafts
    assert pair.steps(2) == 2


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek-v2", "t5"])
def test_an_int8_cache_and_beams(models, name):
    pair = Pair(models(name)[0], name, dtype=torch.int8)
    for parents in ([0, 0, 1, 1], [1, 0, 2, 2], [3, 2, 0, 1]):
        pair.change("reorder_", parents)
        pair.steps(4)
    assert pair.again > 6


@pytest.mark.parametrize("name", ["phi3, long", "llama-3.1", "marian"])
def test_positions_beyond_those_that_there_are(models, name):
    model = models(name)[0]
    pair = Pair(model, name)
    holder = model.backbone.decoder.positions if name == "marian" else model.backbone.rotary
    longest = pair.caches[0].longest
    holder.max_length = longest + 15
    holder.init_buffers()
    assert pair.steps(20) == 20 - 2
    assert holder.max_length > longest + 15


def test_blocks_and_columns_grow(llama):
    pair = Pair(llama, "llama", block_size=2)
    pool = pair.caches[1].tables[None].pool
    before, columns = pool.capacity, pair.caches[1].tables[None].entries.shape[1]
    assert 40 < pair.steps(70) < 68
    assert pool.capacity > 4 * before
    assert pair.caches[1].tables[None].entries.shape[1] > columns


def test_parameters_change_in_place(models, tmp_path):
    pair = Pair(models("gpt2")[0], "gpt2")
    pair.steps(3)
    norm = pair.model.backbone.norm.weight
    with torch.no_grad():
        norm.mul_(2)
        pair.steps(2)
        norm.div_(2)
    assert pair.again == 4


def test_a_wrong_token(llama):
    """Is refused as ever, and the cache is as before."""
    pair = Pair(llama, "llama")
    pair.steps(4)
    lengths = pair.caches[1].tokens.copy()
    for cache in pair.caches:
        with torch.no_grad(), pytest.raises(wf.InputError, match="1000"):
            llama(torch.full((3, 1), 1000), cache=cache)
        with torch.no_grad(), pytest.raises(wf.InputError, match="3 sequences, and the batch has 2"):
            llama(torch.zeros(2, 1, dtype=torch.long), cache=cache)
        with pytest.raises(wf.InputError, match="a cache is for inference"):
            llama(torch.zeros(3, 1, dtype=torch.long), cache=cache)
        assert np.array_equal(cache.tokens, lengths)
    assert pair.steps(2) == 2


@pytest.mark.parametrize("cache", ["cache", 3, transformers.DynamicCache()], ids=lambda c: type(c).__name__)
def test_what_is_no_cache(models, cache):
    ids, memory = torch.zeros(1, 2, dtype=torch.long), torch.randn(1, 2, 8)
    llama, bart = models("llama")[0], models("bart")[0]
    decoder = wf.nn.TransformerDecoder(wf.nn.TransformerDecoderLayer(8, 2, 8, batch_first=True), 1).eval()
    for call in (
        lambda: llama(ids, cache=cache),
        lambda: llama.backbone(ids, cache=cache),
        lambda: bart(decoder_input_ids=ids, cache=cache),
        lambda: bart.backbone(ids, decoder_input_ids=ids, cache=cache),
        lambda: decoder(memory, memory, cache=cache),
    ):
        with torch.no_grad(), pytest.raises(TypeError, match="cache must be a KVCache"):
            call()


def test_a_full_cache(llama):
    pair = Pair(llama, "llama", max_tokens=96, block_size=4)
    with pytest.raises(wf.nn.CacheFull):
        pair.steps(96)
    lengths = pair.caches[0].tokens
    assert pair.again > 4
    with torch.no_grad(), pytest.raises(wf.nn.CacheFull):
        llama(torch.zeros(3, 1, dtype=torch.long), cache=pair.caches[1])
    assert np.array_equal(pair.caches[1].tokens, lengths)


def test_many_rows_are_not_kept(llama):
    with mock.patch.object(recorded_calls, "MOST_ROWS", 2):
        assert Pair(llama, "llama").steps(4) == 0


def test_prompts_are_not_kept(llama):
    assert Pair(llama, "llama").steps(4, recorded_calls.MOST_TOKENS) == 2  # blocks move once
    assert Pair(llama, "llama").steps(4, recorded_calls.MOST_TOKENS + 1) == 0


@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
def test_sequences_leave_and_join(models, name):
    """There is one recording of each number of them."""
    pair = Pair(models(name)[0], name)
    assert pair.steps(3) == 2
    others = [cache.fork([1, 2]) for cache in pair.caches]
    pair.change("reorder_", [2, 0])
    assert pair.steps(3) == 2
    pair.change("reorder_", [1])
    assert pair.steps(3) == 2
    for count in (2, 3, 2, 3, 1):
        pair.change("reorder_", [0])
        for cache, other in zip(pair.caches, others, strict=True):
            cache.join_(other)
        pair.change("reorder_", [*range(count)])
        assert pair.steps(2) == 2


def test_the_most_sequences_so_far(llama):
    """Their table lies elsewhere, and what has come before is recorded again."""
    pair = Pair(llama, "llama")
    assert pair.steps(3) == 2
    pair.change("reorder_", [0, 1, 2, 0])
    assert pair.steps(3) == 2
    pair.change("reorder_", [0, 1, 2])
    assert pair.steps(3) == 2


def test_the_oldest_makes_room(llama):
    pair = Pair(llama, "llama")
    with mock.patch.object(recorded_calls, "MOST_ROWS", 4):
        assert pair.steps(3) == 2
        pair.change("reorder_", [1])
        assert pair.steps(3) == 2
        pair.change("reorder_", [0, 0, 0])
        assert pair.steps(3) == 3
        pair.change("reorder_", [0, 1])
        assert pair.steps(3) == 2  # in the place of one sequence, and of three
        pair.change("reorder_", [0])
        assert pair.steps(3) == 2
        pair.change("reorder_", [0, 0])
        assert pair.steps(3) == 3


def hooked(model):
    return model.backbone.layers[0].register_forward_hook(lambda *_: None).remove


def hooked_everywhere(model):
    return torch.nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def with_forward(model):
    layer = model.backbone.layers[1]
    layer.forward = type(layer).forward.__get__(layer)
    return lambda: delattr(layer, "forward")


def in_training(model):
    model.backbone.layers[0].train()
    return model.eval


def with_autocast(model):
    autocast = torch.autocast("cpu", torch.bfloat16)
    autocast.__enter__()
    return lambda: autocast.__exit__(None, None, None)


def with_profiler(model):
    profiler = torch.profiler.profile()
    profiler.__enter__()
    return lambda: profiler.__exit__(None, None, None)


@pytest.mark.parametrize(
    "changed", [hooked, hooked_everywhere, with_forward, in_training, with_autocast, with_profiler]
)
def test_nothing_is_recorded(llama, changed):
    back = changed(llama)
    try:
        assert Pair(llama, "llama").steps(4) == 0
    finally:
        back()
    assert Pair(llama, "llama").steps(4) == 3


def test_a_fork_records_for_itself(llama):
    pair = Pair(llama, "llama")
    pair.steps(4)
    forks = [cache.fork() for cache in pair.caches]
    pair.steps(2)
    pair.caches = forks
    assert pair.steps(4) == 0
    forks[1].record_()
    assert pair.steps(4) == 3
