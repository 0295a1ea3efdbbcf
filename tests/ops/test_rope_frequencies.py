import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from warpformer import InputError, ops

D, M, THETA = 64, 8192, 500000.0
FACTORS = [1 + i / 8 for i in range(D // 2)]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512}
LONGROPE = {
    "rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1],
    "original_max_position_embeddings": 4096,
}  # fmt: skip
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 2048},
    "llama3 of this length": LLAMA3,
    "yarn": YARN,
    "yarn mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn mscale 0": YARN | {"mscale": 0.707, "mscale_all_dim": 0},
    "yarn attention_factor": YARN | {"attention_factor": 1.3},
    "yarn beta": YARN | {"beta_fast": 8, "beta_slow": 2.5},
    "yarn not truncated": YARN | {"truncate": False},
    "yarn by lengths": YARN | {"factor": None},
    "yarn shrinking": YARN | {"factor": 0.5},
    "longrope": LONGROPE,
    "longrope factor": LONGROPE | {"factor": 32.0},
    "longrope attention_factor": LONGROPE | {"attention_factor": 1.1},
}


@pytest.mark.filterwarnings("ignore")  # transformers' own, of fields it finds unusual
@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("length", [None, 100, 4096, 4097, 20000])
@pytest.mark.parametrize("name", SCALINGS)
def test_as_transformers_has_it(name, length, part):
    scaling = dict(SCALINGS[name])
    if scaling["rope_type"] == "longrope":
        scaling |= {key: scaling[key][: int(part * D / 2)] for key in ("short_factor", "long_factor")}
    config = LlamaConfig(
        hidden_size=2 * D, num_attention_heads=2, max_position_embeddings=M,
        rope_parameters=scaling | {"rope_theta": THETA, "partial_rotary_factor": part},
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=length)
    options = {"max_position_embeddings": M, "sequence_length": length}
    out, out_factor = ops.rope_frequencies(D, scaling, theta=THETA, partial_rotary_factor=part, **options)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected.double(), rtol=2e-6, atol=0)
    assert out_factor == pytest.approx(factor, rel=1e-12)
    in_fields = scaling | {"rope_theta": THETA, "partial_rotary_factor": part}
    assert torch.equal(ops.rope_frequencies(D, in_fields, **options)[0], out)


def test_default():
    out, factor = ops.rope_frequencies(D)
    expected = [10000.0 ** (-2 * i / D) for i in range(D // 2)]
    assert out.tolist() == pytest.approx(expected, rel=1e-14)
    assert factor == 1.0
    for scaling in ({}, {"rope_type": "default"}, {"type": "default"}, {"rope_type": None, "unknown": 3}):
        assert torch.equal(ops.rope_frequencies(D, scaling)[0], out)


def test_formulas():
    """In numbers, where they can be read off."""
    plain = ops.rope_frequencies(D, theta=THETA)[0].tolist()
    linear = ops.rope_frequencies(D, {"type": "linear", "factor": 4}, theta=THETA)[0]
    assert linear.tolist() == pytest.approx([f / 4 for f in plain], rel=1e-14)
    llama = ops.rope_frequencies(D, SCALINGS["llama3"], theta=THETA)[0].tolist()
    yarn, factor = ops.rope_frequencies(D, YARN, theta=THETA)
    for f, out in zip(plain, llama, strict=True):
        turns = 2048 * f / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - 1) / 3))
        assert out == pytest.approx(kept * f + (1 - kept) * f / 8, rel=1e-13)
    assert yarn[0] == plain[0]
    assert yarn[-1].item() == pytest.approx(plain[-1] / 16, rel=1e-14)
    assert factor == pytest.approx(0.1 * math.log(16) + 1)


BAD = {
    "scaling = [] is no mapping": ([], {}),
    "rope_type = 'ntk' is none of: default, linear": ({"rope_type": "ntk"}, {}),
    "rope_type = ['yarn']": ({"rope_type": ["yarn"]}, {}),
    "factor is missing": ({"type": "linear"}, {}),
    "factor = '2' is no number above 0": ({"type": "linear", "factor": "2"}, {}),
    "factor = 0": ({"type": "linear", "factor": 0}, {}),
    "factor = True": ({"type": "linear", "factor": True}, {}),
    "factor = nan": ({"type": "linear", "factor": math.nan}, {}),
    "factor = 1000": ({"type": "linear", "factor": 10**400}, {}),
    "max_position_embeddings is missing": ({"type": "dynamic", "factor": 2}, {}),
    "dynamic scaling needs more than 2": (
        {"type": "dynamic", "factor": 2, "partial_rotary_factor": 2 / D},
        {},
    ),
    "original_max_position_embeddings is missing": (YARN | {"original_max_position_embeddings": None}, {}),
    "low_freq_factor = 4 is not below": (SCALINGS["llama3"] | {"low_freq_factor": 4}, {}),
    "high_freq_factor is missing": (SCALINGS["llama3"] | {"high_freq_factor": None}, {}),
    "truncate = 1 is no bool": (YARN | {"truncate": 1}, {}),
    "beta_fast = -1": (YARN | {"beta_fast": -1}, {}),
    "mscale_all_dim = 'x'": (YARN | {"mscale": 1.0, "mscale_all_dim": "x"}, {}),
    "short_factor = None is no list of 32": (LONGROPE | {"factor": 2, "short_factor": None}, {}),
    "long_factor = [1.0] is no list of 32": (LONGROPE | {"long_factor": [1.0]}, {}),
    "long_factor[3] = 'x'": (LONGROPE | {"long_factor": [*FACTORS[:3], "x", *FACTORS[4:]]}, {}),
    "rope_theta = 1 is no number above 1": ({}, {"theta": 1}),
    "rope_theta = 'x'": ({"rope_theta": "x"}, {}),
    "partial_rotary_factor = 1.5 is no even part": ({"partial_rotary_factor": 1.5}, {}),
    "partial_rotary_factor = 0.05 is no even part": ({}, {"partial_rotary_factor": 0.05}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_fields(message):
    scaling, options = BAD[message]
    with pytest.raises(InputError) as caught:
        ops.rope_frequencies(D, scaling, **options)
    assert str(caught.value).startswith("rope_frequencies: ")
    assert message in str(caught.value)
