import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import warpformer as wf
from warpformer.models import bert

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
    max_position_embeddings=40,
)


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a transformers model of small sizes to a folder; returns both."""

    def write(cls=transformers.BertModel, **overrides):
        torch.manual_seed(0)
        theirs = cls(transformers.BertConfig(**SIZES | {"initializer_range": 0.2} | overrides)).eval()
        theirs.save_pretrained(tmp_path)
        return tmp_path, theirs

    return write


def positions(mask):
    """Of the tokens, wherever the padding is: what ours count by themselves."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (3, 21), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0  # padded on the right,
    mask[2, :4] = 0  # on the left,
    mask[2, 9] = 0  # and in between
    return ids, mask, torch.randint(0, 2, (3, 21), generator=generator)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_equals_transformers(checkpoint, device, hidden_act):
    folder, theirs = checkpoint(hidden_act=hidden_act)
    ids, mask, types = batch()
    with torch.no_grad():
        expected = theirs(ids, mask, types, position_ids=positions(mask))
    found = wf.load(folder, device=device)(ids, mask, types)
    kept = mask.bool()
    torch.testing.assert_close(found.last_hidden_state[kept], expected.last_hidden_state[kept])
    torch.testing.assert_close(found.pooler_output[:2], expected.pooler_output[:2])
    assert not found.last_hidden_state[~kept].any()


def test_defaults_and_positions(checkpoint):
    folder, theirs = checkpoint()
    ids, *_ = batch()
    flipped = torch.arange(21).flip(0)[None]
    model = wf.load(folder)
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state, theirs(ids, position_ids=flipped).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, expected[0])
    torch.testing.assert_close(model(ids.int(), position_ids=flipped).last_hidden_state, expected[1])


def test_bfloat16_is_as_close_as_transformers(checkpoint):
    folder, theirs = checkpoint()
    ids, mask, types = batch()
    kept = mask.bool()
    with torch.no_grad():
        places = positions(mask)
        exact = theirs.double()(ids, mask, types, places).last_hidden_state[kept]
        rounded = theirs.bfloat16()(ids, mask, types, places).last_hidden_state[kept]
    found = wf.load(folder, dtype=torch.bfloat16)(ids, mask, types).last_hidden_state[kept]
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() <= 1.1 * (rounded - exact).norm()


def test_a_sequence_gives_the_same_bits_alone_and_in_any_batch(checkpoint, device):
    model = wf.load(checkpoint()[0])
    ids, mask, types = batch()
    together = model(ids, mask, types).last_hidden_state
    for i in range(3):
        kept = mask[i : i + 1].bool()
        alone = model(ids[i : i + 1], kept, types[i : i + 1]).last_hidden_state
        assert torch.equal(alone[kept], together[i : i + 1][kept])


def test_state_dict_round_trip(checkpoint):
    model = wf.load(checkpoint()[0])
    state = model.state_dict()
    assert {k for k in state if "qkv" in k and "layers.0" in k} == {
        f"layers.0.attention.qkv.{part}.{kind}"
        for part in ("query", "key", "value")
        for kind in ("weight", "bias")
    }
    other = bert.Model(model.config).eval()
    other.load_state_dict(state)
    ids, mask, types = batch()
    assert torch.equal(other(ids, mask, types).pooler_output, model(ids, mask, types).pooler_output)


def test_names_of_the_checkpoint(checkpoint):
    folder, theirs = checkpoint()
    names, keys = wf.load(folder).state_dict(), bert.KEYS
    assert {keys.theirs(name) for name in names} == set(theirs.state_dict())
    assert all(keys.ours(keys.theirs(name), names) == name for name in names)


class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_the_work_is_done_by_our_kernels(checkpoint):
    model = wf.load(checkpoint()[0])
    with Record() as record:
        model(*batch())
    ours = {name.removeprefix("warpformer::") for name in record.names if name.startswith("warpformer::")}
    assert ours == {"embedding_sum", "layer_norm", "linear", "scaled_dot_product_attention"}
    work = ("mm", "matmul", "linear", "softmax", "norm", "gelu", "attention", "embedding", "tanh", "einsum")
    assert not [name for name in record.names - ours if name.startswith("aten::") and name.endswith(work)]
    assert not [
        name for name in record.names if name.startswith(("aten::addmm", "aten::bmm", "aten::_scaled"))
    ]


def test_no_gradients(checkpoint):
    model = wf.load(checkpoint()[0])
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
