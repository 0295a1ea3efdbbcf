import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DeepseekV2Config, GptOssConfig, MixtralConfig
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.mixtral import modeling_mixtral as mixtral

import warpformer as wf
from tests.check import check, check_gradients, host_reads, same_bits, threads
from warpformer.nn import (
    ClampedSwiGLU,
    Experts,
    GroupLimitedTopK,
    MixtureOfExperts,
    Router,
    SoftmaxTopK,
    TopKSoftmax,
    load_balancing_loss,
    router_z_loss,
)
from warpformer.ops._recording import Recording

EXPERTS, C, HIDDEN, ROWS = 5, 72, 40, 64


def clamped_gate(gate_up):
    """That of gpt-oss, with a limit that some values are beyond."""
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate.clamp(max=1.0), up.clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def routing(k, chosen=range(EXPERTS)):
    """Ids of which no expert but those chosen is one, and weights."""
    order = torch.rand(ROWS, len(chosen)).argsort(1)[:, :k]
    return torch.tensor(list(chosen))[order], torch.rand(ROWS, k)


def by_torch(ids, gate, x, weights, up, down, up_bias=None, down_bias=None):
    """Expert by expert."""
    biases = [[None] * EXPERTS if bias is None else bias for bias in (up_bias, down_bias)]
    out = torch.zeros_like(x, dtype=weights.dtype)
    for e, (u, d, ub, db) in enumerate(zip(up, down, *biases, strict=True)):
        rows, places = torch.where(ids == e)
        of_expert = F.linear(gate(F.linear(x[rows], u, ub)), d, db)
        out = out.index_add(0, rows, of_expert * weights[rows, places, None])
    return out.to(x.dtype)


def call(experts, ids):
    names = ["gate_up.weight", "down.weight", "gate_up.bias", "down.bias"]

    def function(x, weights, *parameters):
        state = dict(zip(names, parameters, strict=False))
        return torch.func.functional_call(experts, state, (x, ids, weights))

    return function


def has_cuda_kernel(params):
    return params.get("format") is not None


CASES = {
    "two of five": (2, range(EXPERTS)),
    "one": (1, range(EXPERTS)),
    "all": (EXPERTS, range(EXPERTS)),
    "two that everyone chooses": (2, (1, 3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_against_torch(device, dtype, case, bias):
    ids, weights = routing(*CASES[case])
    activation, gate = ("silu", swiglu) if not bias else (ClampedSwiGLU(limit=1.0), clamped_gate)
    experts = Experts(EXPERTS, C, HIDDEN, activation, bias, dtype=dtype)
    parameters = [experts.gate_up.weight, experts.down.weight, experts.gate_up.bias, experts.down.bias]
    x = torch.randn(ROWS, C, dtype=dtype)
    inputs = (x, weights, *(p.detach() for p in parameters if p is not None))

    def reference(*inputs):
        return by_torch(ids, gate, *inputs)

    with torch.no_grad():
        check(call(experts, ids), reference, *inputs)
    check_gradients(call(experts, ids), reference, *inputs)


@pytest.mark.parametrize(
    "mode", ["train", "no_grad", "packed", "int8", "int4", "int8_dynamic", "int4_dynamic", "nf4"]
)
@pytest.mark.parametrize("activation", ["silu", ClampedSwiGLU()], ids=["fused", "module"])
def test_a_row_is_the_same_in_every_batch(device, dtype, mode, activation):
    router = Router(C, EXPERTS, SoftmaxTopK(3), dtype=dtype)
    moe = MixtureOfExperts(router, Experts(EXPERTS, C, HIDDEN, activation, bias=True, dtype=dtype))
    if mode == "packed":
        moe.experts = packed(moe.experts)
    elif mode not in ("train", "no_grad"):
        wf.quantize_(moe.experts, mode, None if mode == "int8_dynamic" else 32)
    x = torch.randn(20, C, dtype=dtype)
    with torch.set_grad_enabled(mode == "train"), threads(1):
        together = moe(x)
        for n in (1, 2, 7):
            parts = torch.cat([moe(part) for part in x.split(n)])
            assert same_bits(parts.detach(), together.detach())
        with threads(3):
            assert same_bits(moe(x).detach(), together.detach())


@pytest.mark.parametrize("format", ["int8", "int4_dynamic", "nf4"])
@pytest.mark.parametrize("activation", ["silu", ClampedSwiGLU()], ids=["fused", "module"])
def test_a_row_is_the_same_in_every_batch_of_quantized_experts(device, dtype, format, activation):
    """With gradients, whatever the router."""
    experts = Experts(EXPERTS, C, HIDDEN, activation, bias=True, dtype=dtype)
    wf.quantize_(experts, format, 32)
    ids, weights = routing(2)
    x = torch.randn(ROWS, C, dtype=dtype, requires_grad=True)
    together = experts(x, ids, weights)
    grad = torch.randn_like(together)
    gradient = torch.autograd.grad(together, x, grad)[0]
    for n in (1, 23):
        inputs = (t[-n:].split(7) for t in (x, ids, weights))
        parts = torch.cat([experts(*part) for part in zip(*inputs, strict=True)])
        assert same_bits(parts.detach(), together[-n:].detach())
        assert same_bits(torch.autograd.grad(parts, x, grad[-n:])[0][-n:], gradient[-n:])


@pytest.mark.parametrize("format", ["int4"])
@torch.no_grad()
def test_what_no_expert_is_chosen_for_is_0(device, format):
    """Where ids are not looked at; a host refuses them."""
    experts, x = Experts(EXPERTS, C, HIDDEN), torch.randn(3, C)
    wf.quantize_(experts, format, 32)
    ids, weights = torch.tensor([[0, 1], [-1, EXPERTS], [2, 2**40]]), torch.ones(3, 2)
    if host_reads(wf._C.grouped_linear):
        with pytest.raises(wf.InputError):
            experts(x, ids, weights)
        return
    out = experts(x, ids, weights)
    assert not out[1].any()
    assert same_bits(out[2], experts(x, ids.clamp(max=EXPERTS), weights)[2])
    assert same_bits(out[0], experts(x[:1], ids[:1], weights[:1])[0])


def packed(experts):
    other = copy.deepcopy(experts)
    for name in ("gate_up", "down"):
        layer = getattr(experts, name)
        options = {"gated": layer.gated, "dtype": layer.weight.dtype}
        shape = layer.num_experts, layer.in_features, layer.out_features, layer.bias is not None
        setattr(other, name, wf.nn.PackedGroupedLinear(*shape, **options))
    other.load_state_dict(experts.state_dict())
    return other


@pytest.mark.parametrize("mode", ["int8", "int4", "nf4"])
@torch.no_grad()
def test_quantized_experts(mode):
    experts, x = Experts(EXPERTS, C, HIDDEN), torch.randn(ROWS, C)
    ids, weights = routing(2)
    quantized = copy.deepcopy(experts)
    assert [row.name for row in wf.quantize_(quantized, mode, None if mode == "int8_dynamic" else 32)] == [
        "gate_up",
        "down",
    ]
    experts.gate_up.weight.copy_(quantized.gate_up.weight)
    experts.down.weight.copy_(quantized.down.weight)
    torch.testing.assert_close(quantized(x, ids, weights), experts(x, ids, weights), rtol=1e-4, atol=1e-5)


def test_shapes():
    experts = Experts(EXPERTS, C, HIDDEN)
    x, ids = torch.randn(0, C, requires_grad=True), torch.zeros(0, 2, dtype=torch.int64)
    out = experts(x, ids, torch.zeros(0, 2))
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, C)
    moe = MixtureOfExperts(Router(C, EXPERTS, SoftmaxTopK(2)), experts, nn.Identity())
    x = torch.randn(2, 3, 4, C)
    assert same_bits(moe(x)[1, 2], moe(x[1, 2]))


@pytest.mark.parametrize("ids", [[-1, 0], [0, EXPERTS]])
def test_no_such_expert(ids):
    with pytest.raises(wf.InputError, match=r"sort_by_expert.*expert_ids"):
        Experts(EXPERTS, C, HIDDEN)(torch.randn(1, C), torch.tensor([ids]), torch.ones(1, 2))


def test_compiles():
    moe, x = (
        MixtureOfExperts(Router(C, EXPERTS, SoftmaxTopK(2)), Experts(EXPERTS, C, HIDDEN)),
        torch.randn(9, C),
    )
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")

    def loss(module):
        out = module(x)
        return out, torch.autograd.grad(out.square().sum() + moe.aux_loss(0.1, 0.1), [*moe.parameters()])

    (out, gradients), (expected, expected_gradients) = loss(compiled), loss(moe)
    assert same_bits(out.detach(), expected.detach())
    for ours, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("selection", [SoftmaxTopK(2, False), TopKSoftmax(2)])
def test_a_recorded_step_is_kernels_alone(selection):
    moe = MixtureOfExperts(Router(C, EXPERTS, selection), Experts(EXPERTS, C, HIDDEN)).eval()
    x = torch.randn(3, C)
    with torch.no_grad():
        recording = Recording(lambda: moe(x), torch.device("cpu"))
        assert recording.is_whole
        assert len(recording._parts) == 1
        x.normal_()
        assert same_bits(recording(), moe(x))


def test_autocast():
    moe = MixtureOfExperts(Router(C, EXPERTS, SoftmaxTopK(2)), Experts(EXPERTS, C, HIDDEN))
    x = torch.randn(9, C)
    logits = moe.router(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = moe(x)
    assert same_bits(moe.routing.logits.detach(), logits.detach())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), moe(x), rtol=0.05, atol=0.02)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


# Routers


def mixtral_config(**options):
    return MixtralConfig(
        hidden_size=C, intermediate_size=HIDDEN, num_local_experts=8, num_experts_per_tok=3, **options
    )


def test_the_block_of_mixtral():
    theirs = mixtral.MixtralSparseMoeBlock(mixtral_config()).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MixtureOfExperts(Router(C, 8, SoftmaxTopK(3)), Experts(8, C, HIDDEN))
    ours.load_state_dict(
        {
            "router.weight": theirs.gate.weight,
            "experts.gate_up.weight": theirs.experts.gate_up_proj,
            "experts.down.weight": theirs.experts.down_proj,
        }
    )
    x = torch.randn(4, 9, C)
    torch.testing.assert_close(ours(x), theirs(x))
    ids, weights, probabilities, logits = ours.router(x.flatten(0, 1))
    _, their_weights, their_ids = theirs.gate(x)
    assert torch.equal(ids, their_ids)
    torch.testing.assert_close(weights, their_weights)
    theirs_loss = mixtral.load_balancing_loss_func((logits,), 8, 3)
    torch.testing.assert_close(load_balancing_loss(probabilities, ids, 8), theirs_loss)


def test_not_normalized():
    """Grok-1."""
    router, x = Router(C, 8, SoftmaxTopK(2, normalize=False)), torch.randn(ROWS, C)
    weights, ids = F.linear(x, router.weight).softmax(-1).topk(2)
    routing = router(x)
    assert torch.equal(routing.expert_ids, ids)
    torch.testing.assert_close(routing.weights, weights)


def test_the_block_of_gpt_oss():
    config = GptOssConfig(hidden_size=C, intermediate_size=HIDDEN, num_local_experts=8, num_experts_per_tok=3)
    theirs = gpt_oss.GptOssMLP(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = MixtureOfExperts(
        Router(C, 8, TopKSoftmax(3), bias=True), Experts(8, C, HIDDEN, ClampedSwiGLU(), bias=True)
    )
    ours.load_state_dict(
        {
            "router.weight": theirs.router.weight,
            "router.bias": theirs.router.bias,
            "experts.gate_up.weight": theirs.experts.gate_up_proj.mT,
            "experts.gate_up.bias": theirs.experts.gate_up_proj_bias,
            "experts.down.weight": theirs.experts.down_proj.mT,
            "experts.down.bias": theirs.experts.down_proj_bias,
        }
    )
    x = torch.randn(4, 9, C)
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_the_block_of_deepseek(method):
    config = DeepseekV2Config(
        hidden_size=C, num_attention_heads=8, moe_intermediate_size=HIDDEN, n_routed_experts=8,
        num_experts_per_tok=3, n_shared_experts=2, topk_method=method, n_group=4, topk_group=2,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs = deepseek.DeepseekV2Moe(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    selection = {
        "greedy": SoftmaxTopK(3, normalize=False, scale=2.5),
        "group_limited_greedy": GroupLimitedTopK(3, 4, 2, scale=2.5),
    }[method]
    ours = MixtureOfExperts(Router(C, 8, selection), Experts(8, C, HIDDEN), theirs.shared_experts)
    ours.load_state_dict(
        {
            "router.weight": theirs.gate.weight,
            "experts.gate_up.weight": theirs.experts.gate_up_proj,
            "experts.down.weight": theirs.experts.down_proj,
            **{f"shared.{name}": value for name, value in theirs.shared_experts.state_dict().items()},
        }
    )
    x = torch.randn(4, 9, C)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("selection", "ids"),
    [
        (SoftmaxTopK(3), [0, 2, 5]),
        (TopKSoftmax(3), [0, 2, 5]),
        (GroupLimitedTopK(3, 3, 2), [0, 2, 1]),
        (GroupLimitedTopK(4, 3, 2), [0, 2, 1, 3]),
    ],
)
def test_of_equal_experts_the_first(selection, ids):
    logits = torch.tensor([1.0, 0.0, 1.0, 0.0, -200.0, 1.0]).expand(70, 6)
    chosen, weights, probabilities = selection(logits)
    assert torch.equal(chosen, torch.tensor(ids).expand(70, -1))
    assert same_bits(weights, weights[:1].expand(70, -1))
    torch.testing.assert_close(probabilities, logits.softmax(-1))


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("other", [0.0, -0.0, -torch.inf, torch.nan])
def test_the_largest_are_those_of_a_stable_sort(k, other):
    """With a gradient and without."""
    logits = torch.randint(-3, 3, (50, 20)).float()
    logits[::2, ::3] = other
    logits[0] = other
    for values, selection in ((logits, TopKSoftmax(k)), (wf.ops.softmax(logits), SoftmaxTopK(k, False))):
        ids = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        largest = values.gather(-1, ids)
        expected = largest if values is not logits else wf.ops.softmax(largest)
        for x in (logits, logits.clone().requires_grad_()):
            found, weights, _ = selection(x)
            assert torch.equal(found, ids)
            assert same_bits(weights.detach(), expected)


def test_experts_outside_of_the_chosen_groups_are_never_chosen():
    """Though those inside have no probability left."""
    ids, weights, _ = GroupLimitedTopK(2, 2, 1)(torch.tensor([[0.0, 0.0, 500.0, -500.0]]))
    assert ids.tolist() == [[2, 3]]
    assert weights.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    "selection",
    [SoftmaxTopK(0), SoftmaxTopK(9), TopKSoftmax(9), GroupLimitedTopK(2, 3, 1), GroupLimitedTopK(3, 4, 1)],
)
def test_more_than_there_are(selection):
    with pytest.raises(wf.InputError, match=r"k = |does not fit 8 experts"):
        Router(C, 8, selection)(torch.randn(2, C))


def test_logits_are_exact():
    """Of bfloat16, in float32."""
    router, x = (
        Router(C, EXPERTS, SoftmaxTopK(2), bias=True, dtype=torch.bfloat16),
        torch.randn(9, C).bfloat16(),
    )
    logits = router(x).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, F.linear(x.float(), router.weight.float(), router.bias.float()))


@pytest.mark.parametrize(
    "selection", [SoftmaxTopK(2), SoftmaxTopK(2, False, 2.5), TopKSoftmax(2), GroupLimitedTopK(2, 4, 2)]
)
def test_gradients_of_routing_and_losses(selection):
    router, x = Router(C, 8, selection, bias=True), torch.randn(ROWS, C)
    grad = torch.randn(ROWS, 2)

    def loss(router):
        ids, weights, probabilities, logits = router(x)
        return (weights * grad).sum() + load_balancing_loss(probabilities, ids, 8) + router_z_loss(logits)

    def reference(ids):
        logits = F.linear(x.double(), *parameters)
        probabilities = logits.softmax(-1)
        weights = (
            logits.gather(1, ids).softmax(-1)
            if type(selection) is TopKSoftmax
            else probabilities.gather(1, ids)
        )
        if getattr(selection, "normalize", False):
            weights = weights / weights.sum(1, keepdim=True)
        weights = weights * getattr(selection, "scale", 1.0)
        fractions = F.one_hot(ids, 8).double().sum(1).mean(0)
        balance = 8 * (fractions * probabilities.mean(0)).sum()
        return (weights * grad).sum() + balance + logits.exp().sum(1).log().square().mean()

    parameters = [p.detach().double().requires_grad_() for p in router.parameters()]
    ours = torch.autograd.grad(loss(router), [*router.parameters()])
    expected = torch.autograd.grad(reference(router(x).expert_ids), parameters)
    for gradient, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-5)


def test_values_of_the_losses():
    ids = torch.arange(8).repeat(2)[:, None]
    assert load_balancing_loss(torch.full((16, 8), 1 / 8), ids, 8) == 1
    certain = F.one_hot(torch.zeros(16, dtype=torch.int64), 8).float()
    assert load_balancing_loss(certain, torch.zeros(16, 1, dtype=torch.int64), 8) == 8
    assert router_z_loss(torch.zeros(3, 8)) == pytest.approx(torch.tensor(8.0).log().item() ** 2)


# Training


def test_the_routing_is_that_of_the_last_training_step():
    moe, x = (
        MixtureOfExperts(Router(C, EXPERTS, SoftmaxTopK(2)), Experts(EXPERTS, C, HIDDEN)),
        torch.randn(9, C),
    )
    with pytest.raises(RuntimeError, match="no forward in training mode"):
        moe.aux_loss()
    moe(x)
    ids, _, probabilities, logits = moe.routing
    expected = 0.3 * load_balancing_loss(probabilities, ids, EXPERTS) + 0.2 * router_z_loss(logits)
    assert same_bits(moe.aux_loss(0.3, 0.2).detach(), expected.detach())
    assert copy.deepcopy(moe).routing is None
    moe.eval()(x)
    assert moe.routing is None


def shares(balance):
    """Trains a mixture of eight on sixteen clusters that lie in one direction from the origin, which is what
    makes one expert the choice of all; each cluster has a linear map of its own to learn."""
    torch.manual_seed(1)
    clusters, width, batch = 16, 16, 256
    centers, maps = torch.randn(clusters, width) + 2, torch.randn(clusters, width, width) / width**0.5
    moe = MixtureOfExperts(Router(width, 8, SoftmaxTopK(1, normalize=False)), Experts(8, width, 32))
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.01)
    counts = torch.zeros(8)
    for step in range(200):
        of_cluster = torch.randint(clusters, (batch,))
        x = centers[of_cluster] + 0.3 * torch.randn(batch, width)
        target = torch.einsum("nc,ncd->nd", x, maps[of_cluster])
        loss = F.mse_loss(moe(x), target) + moe.aux_loss(balance, 0.001)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 150:
            counts += moe.routing.expert_ids.flatten().bincount(minlength=8)
    return counts / counts.sum() * 8


def test_the_balance_loss_keeps_every_expert_busy():
    assert shares(balance=0.3).min() >= 0.5
    assert shares(balance=0.0).min() < 0.5
