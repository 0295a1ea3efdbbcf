"""ONNX Runtime's matrix products: models of one node, whose weights it packs before the first run."""

import functools

import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"


def is_held_to(isa):
    """It chooses by the CPU, and nothing but the CPU sways it."""
    return isa not in ("scalar", "avx2")


@functools.cache
def _share_threads(threads):
    """One pool for all sessions, as the threads of many would spin against each other."""
    onnxruntime.set_global_thread_pool_sizes(threads, 1)


class Linear:
    """x @ weight.T by one node, bound to its tensors: every call computes it into the same output."""

    def __init__(self, x, n, op, initializers, domain="", **attributes):
        self.x, self.y = x, torch.empty(len(x), n)
        node = helper.make_node(op, ["x", *initializers], ["y"], domain=domain, **attributes)
        tensors = [numpy_helper.from_array(t.numpy(), name) for name, t in initializers.items()]
        x_info, y_info = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, t.shape)
            for name, t in (("x", self.x), ("y", self.y))
        )
        graph = helper.make_graph([node], op, [x_info], [y_info], tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        _share_threads(torch.get_num_threads())
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        self.binding.bind_input("x", "cpu", 0, TensorProto.FLOAT, x.shape, x.data_ptr())
        self.binding.bind_output("y", "cpu", 0, TensorProto.FLOAT, self.y.shape, self.y.data_ptr())

    def __call__(self):
        self.session.run_with_iobinding(self.binding)
        return self.y


def matmul(x, weight):
    """float32 [N, K]"""
    return Linear(x, len(weight), "MatMul", {"w": weight.t().contiguous()})


def matmul_nbits(x, weight, accuracy_level=1):
    """4 bits, symmetric; accuracy_level 1: float32 activations, 4: int8 ones with a scale per group."""
    n, k, group = len(weight.values), weight.in_features, weight.group_size
    return Linear(
        x,
        n,
        "MatMulNBits",
        {"w": weight.values.view(n, k // group, group // 2), "scales": weight.scales.float()},
        MICROSOFT,
        N=n,
        K=k,
        bits=4,
        block_size=group,
        accuracy_level=accuracy_level,
    )


matmul_nbits_dynamic = functools.partial(matmul_nbits, accuracy_level=4)


def dynamic_quantize_matmul(x, weight):
    """int8 weights with a scale per output, uint8 activations with one scale for all."""
    return Linear(
        x,
        len(weight.values),
        "DynamicQuantizeMatMul",
        {"w": weight.values.t().contiguous(), "scales": weight.scales.float().flatten()},
        MICROSOFT,
    )
