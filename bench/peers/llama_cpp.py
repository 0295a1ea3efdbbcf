"""llama.cpp's matrix product, out of the ggml library that llama-cpp-python ships, as llama.cpp calls it; and
the whole of a model."""

import ctypes
import functools
import importlib.util
import json
import weakref
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import torch

from warpformer.ops import QuantizedWeight

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


class CausalLM:
    """The logits [1, V] of the last of `tokens` ids [1, T] by the model of a GGUF file."""

    def __init__(self, path, tokens):
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.model = Llama(
            str(path), n_ctx=tokens, n_batch=tokens, n_ubatch=tokens, n_threads=threads,
            n_threads_batch=threads, verbose=False,
        )  # fmt: skip

    def __call__(self, ids):
        return self.read(ids, 0)

    def read(self, ids, held):
        """The same of ids [1, T] behind the first `held` tokens that it has read."""
        from llama_cpp import llama_get_logits_ith

        self.model.n_tokens = held
        self.model.eval(ids[0].tolist())
        logits = llama_get_logits_ith(self.model.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (1, self.model.n_vocab())).copy())


class Decoder(CausalLM):
    """The logits [1, V] of a token [1, 1] behind a prompt [1, T], by the model of a GGUF file."""

    def __init__(self, path, prompt):
        super().__init__(path, prompt.shape[1] + 1)
        self.held = prompt.shape[1]
        self.read(prompt, 0)

    def __call__(self, ids):
        return self.read(ids, self.held)


TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_llama(folder, path):
    """A GGUF file of the Llama that `warpformer.save` wrote in 4 or 8 bits with groups of 32, the same
    numbers in Q4_0 or Q8_0. It has no tokenizer. Returns `path`."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "scales":
            continue
        _, _, layer = module.partition("model.layers.")
        number, _, name = layer.partition(".")
        name = LAYER[name] if layer else TOP[module]
        full = f"blk.{number}.{name}.weight" if layer else f"{name}.weight"
        if leaf == "weight":
            writer.add_tensor(full, tensor.float().numpy())
            continue
        is_8_bit = tensor.dtype == torch.int8
        mode, width = ("int8", tensor.shape[1]) if is_8_bit else ("int4", 2 * tensor.shape[1])
        weight = QuantizedWeight(tensor, tensors[f"{module}.scales"], None, mode, width, BLOCK)
        blocks = _blocks(weight).flatten(1)
        if name in heads:  # which llama.cpp rotates by pairs of neighbours, not of halves
            blocks = blocks.unflatten(0, (heads[name], 2, -1)).transpose(1, 2).flatten(0, 2)
        kind = GGMLQuantizationType.Q8_0 if is_8_bit else GGMLQuantizationType.Q4_0
        writer.add_tensor(full, blocks.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
