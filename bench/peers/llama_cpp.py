"""llama.cpp's matrix product, out of the ggml library that llama-cpp-python ships, as llama.cpp calls it."""

import ctypes
import functools
import importlib.util
import weakref
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

F32, Q4_0, Q8_0 = 0, 2, 8  # of enum ggml_type
BLOCK = 32  # values that share a float16 scale, in either
WEIGHTS = 1  # of enum ggml_backend_buffer_usage
OVERHEAD = 1 << 20  # bytes, more than three tensors and a graph of one node take


class InitParams(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("memory", c_void_p), ("no_alloc", c_bool))


FUNCTIONS = {  # name, less its "ggml_": (result, *arguments)
    "init": (c_void_p, InitParams),
    "free": (None, c_void_p),
    "new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "new_graph": (c_void_p, c_void_p),
    "build_forward_expand": (None, c_void_p, c_void_p),
    "log_set": (None, c_void_p, c_void_p),
    "cpu_has_avx512": (c_int,),
    "backend_cpu_init": (c_void_p,),
    "backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "backend_cpu_buffer_type": (c_void_p,),
    "backend_cpu_buffer_from_ptr": (c_void_p, c_void_p, c_size_t),
    "backend_graph_compute": (c_int, c_void_p, c_void_p),
    "backend_get_device": (c_void_p, c_void_p),
    "backend_dev_backend_reg": (c_void_p, c_void_p),
    "backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "backend_buft_alloc_buffer": (c_void_p, c_void_p, c_size_t),
    "backend_buft_get_alloc_size": (c_size_t, c_void_p, c_void_p),
    "backend_buffer_get_base": (c_void_p, c_void_p),
    "backend_buffer_set_usage": (None, c_void_p, c_int),
    "backend_buffer_free": (None, c_void_p),
    "backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
}


def _load():
    package = importlib.util.find_spec("llama_cpp")
    if package is None:
        raise ModuleNotFoundError("llama-cpp-python is not installed", name="llama-cpp-python")
    library = ctypes.CDLL(str(Path(package.origin).parent / "lib" / "libggml.so"))
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(library, f"ggml_{name}")
        function.restype, function.argtypes = result, arguments
    return library


ggml = _load()
silence = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
ggml.ggml_log_set(silence, None)


def is_held_to(isa):
    """Its instructions were chosen when it was built: CMAKE_ARGS=-DGGML_NATIVE=OFF is AVX2."""
    return isa not in ("scalar", "avx2") or (isa == "avx2" and not ggml.ggml_cpu_has_avx512())


@functools.cache
def backend():
    return ggml.ggml_backend_cpu_init()


@functools.cache
def buffer_types():
    """Those that the CPU computes from, best first: the ones that rearrange weights, then the plain one."""
    device = ggml.ggml_backend_get_device(backend())
    address = ggml.ggml_backend_reg_get_proc_address(
        ggml.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
    )
    extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
    types = []
    while extra[len(types)]:
        types.append(extra[len(types)])
    return [*types, ggml.ggml_backend_cpu_buffer_type()]


class Linear:
    """x @ weight.T by a graph of one node, bound to its tensors: every call computes it into the same output.

    Args:
        x: float32 [M, K]
        weight: a symmetric QuantizedWeight; as Q4_0 or Q8_0, whose blocks of 32 repeat a wider group's scale.
    """

    def __init__(self, x, weight):
        blocks = _blocks(weight)
        kind = Q8_0 if weight.values.dtype == torch.int8 else Q4_0
        self.x, self.y = x, torch.empty(len(x), len(blocks))
        for buffer_type in buffer_types():  # the first that computes this product
            self.context = ggml.ggml_init(InitParams(OVERHEAD, None, True))
            w = ggml.ggml_new_tensor_2d(self.context, kind, x.shape[1], len(blocks))
            a = ggml.ggml_new_tensor_2d(self.context, F32, x.shape[1], len(x))
            y = ggml.ggml_mul_mat(self.context, w, a)
            size = ggml.ggml_backend_buft_get_alloc_size(buffer_type, w)
            buffer = ggml.ggml_backend_buft_alloc_buffer(buffer_type, size)
            ggml.ggml_backend_buffer_set_usage(buffer, WEIGHTS)
            ggml.ggml_backend_tensor_alloc(buffer, w, ggml.ggml_backend_buffer_get_base(buffer))
            if ggml.ggml_backend_dev_supports_op(ggml.ggml_backend_get_device(backend()), y):
                break
            _free(self.context, [buffer])
        buffers = [buffer]
        for tensor, ours in ((a, self.x), (y, self.y)):
            buffers.append(ggml.ggml_backend_cpu_buffer_from_ptr(ours.data_ptr(), ours.nbytes))
            ggml.ggml_backend_tensor_alloc(buffers[-1], tensor, ours.data_ptr())
        ggml.ggml_backend_tensor_set(w, blocks.data_ptr(), 0, blocks.nbytes)
        self.graph = ggml.ggml_new_graph(self.context)
        ggml.ggml_build_forward_expand(self.graph, y)
        weakref.finalize(self, _free, self.context, buffers)

    def __call__(self):
        ggml.ggml_backend_cpu_set_n_threads(backend(), torch.get_num_threads())
        ggml.ggml_backend_graph_compute(backend(), self.graph)
        return self.y


def _free(context, buffers):
    for buffer in buffers:
        ggml.ggml_backend_buffer_free(buffer)
    ggml.ggml_free(context)


def _blocks(weight):
    """uint8 [N, K / 32, bytes of a block]: a float16 scale, then 32 codes; of 4 bits, k and k + 16 in a
    byte."""
    n, blocks = len(weight.values), weight.in_features // BLOCK
    scales = weight.scales.half().repeat_interleave(weight.group_size // BLOCK, 1)
    if weight.values.dtype == torch.int8:
        codes = weight.values.view(torch.uint8).view(n, blocks, BLOCK)
    else:
        codes = torch.stack((weight.values & 15, weight.values >> 4), -1).view(n, blocks, 2, BLOCK // 2)
        codes = codes[:, :, 0] | codes[:, :, 1] << 4
    return torch.cat((scales.view(torch.uint8).view(n, blocks, 2), codes), -1)
