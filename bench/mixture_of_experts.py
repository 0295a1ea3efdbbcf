import copy

import pytest
import torch

import warpformer as wf

EXPERTS, CHOSEN, WIDTH, HIDDEN = 8, 2, 1024, 3584


def blocks(dtype):
    """Mixtral's as transformers has it, which loops over experts or multiplies them in groups, and ours."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_local_experts": EXPERTS}
    with torch.inference_mode(False):
        loop = MixtralSparseMoeBlock(MixtralConfig(num_experts_per_tok=CHOSEN, **sizes))
        for parameter in loop.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        loop = loop.to(dtype)
        grouped = copy.deepcopy(loop)
        loop.experts.config._experts_implementation = "eager"
        grouped.experts.config._experts_implementation = "grouped_mm"
        router = wf.nn.Router(WIDTH, EXPERTS, wf.nn.SoftmaxTopK(CHOSEN), dtype=dtype)
        ours = wf.nn.MixtureOfExperts(router, wf.nn.Experts(EXPERTS, WIDTH, HIDDEN, dtype=dtype))
        ours.load_state_dict(
            {
                "router.weight": loop.gate.weight,
                "experts.gate_up.weight": loop.experts.gate_up_proj,
                "experts.down.weight": loop.experts.down_proj,
            }
        )
    return ours, {"transformers": loop, "grouped_mm": grouped}


def rows(tokens, dtype):
    return lambda: (torch.randn(1, tokens, WIDTH, dtype=dtype),)


def cost(tokens, bits):
    """Bytes and operations of one forward."""
    expert = 3 * WIDTH * HIDDEN
    read = min(EXPERTS, CHOSEN * tokens) * expert
    return int(read * bits / 8) + 2 * tokens * WIDTH * 2, 2 * tokens * CHOSEN * expert


@pytest.mark.parametrize("format", ["f32", "bf16", "int4"])
@pytest.mark.parametrize("tokens", [1, 16, 256])
def bench_forward(compare, tokens, format):
    """int4 beside bfloat16 of theirs."""
    dtype = torch.float32 if format == "f32" else torch.bfloat16
    ours, theirs = blocks(dtype)
    if format == "int4":
        wf.quantize_(ours, format)
    moved, flops = cost(tokens, {"f32": 32, "bf16": 16, "int4": 4.125}[format])
    compare(
        f"{tokens} tokens, {CHOSEN} of {EXPERTS} experts {WIDTH} -> {HIDDEN} SwiGLU {format}",
        dtype=dtype,
        inputs=rows(tokens, dtype),
        ours=ours.eval(),
        peers={name: block.eval() for name, block in theirs.items()},
        moved=moved,
        flops=flops,
        tolerance=0.3,  # the router of theirs rounds: a few tokens go to other experts
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_gradients(compare, dtype):
    """Forward and backward."""
    ours, theirs = blocks(dtype)
    moved, flops = cost(256, 8 * dtype.itemsize)
    compare(
        f"256 tokens, {CHOSEN} of {EXPERTS} experts {WIDTH} -> {HIDDEN} SwiGLU, forward and backward",
        dtype=dtype,
        inputs=rows(256, dtype),
        ours=with_gradients(ours),
        peers={name: with_gradients(block) for name, block in theirs.items()},
        moved=3 * moved,
        flops=3 * flops,
        tolerance=0.3,
    )


def with_gradients(block):
    def step(x):
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            gradients = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
            return gradients[0]

    return step
