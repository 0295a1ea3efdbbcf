"""What loading takes at its peak: the model as it will be, and one layer as the checkpoint has it."""

import json
import shutil

import pytest
import torch
import transformers

from .process import run

# The allowance: 4 M weights between quantizing and packing, 2 MiB pages, scratch of the kernels and of torch.
MARGIN = 32
SIZES = dict(
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=4,
)
MODELS = {  # with a layer of 128 MiB: the output, or all gates of a mixture, 16 tensors of the checkpoint
    "llama": lambda: transformers.LlamaConfig(**SIZES, vocab_size=1 << 16),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES | dict(intermediate_size=4096), vocab_size=100),
}
OPTIONS = {  # and how many MiB they make of a layer
    "": 128,
    'quantization="int8"': 128,
    'quantization="int4"': 128,
    "dtype=torch.float32": 256,
    "trainable=True": 128,
}
# A process for each, which all have the imports of the first.
SCRIPT = """
    import gc, json, os, sys, torch
    import warpformer as wf

    def status(key):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

    def measure(folder, options):
        wf.load(folder + "/small", **options)  # imports
        gc.collect()
        before = status("VmRSS:")
        open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew
        model = wf.load(folder, **options)
        held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) / 2**20
        return status("VmHWM:") - before, held

    folder = os.environ["FOLDER"]
    wf.load(folder + "/small")
    for text in json.loads(os.environ["OPTIONS"]):
        if not os.fork():
            print(json.dumps({text: measure(folder, eval(f"dict({text})"))}), flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module", params=MODELS)
def peaks(request, tmp_path_factory):
    """Of the options (the peak of loading with them, what the model holds), in MiB."""
    folder = tmp_path_factory.mktemp(request.param)
    config = MODELS[request.param]()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.bfloat16().to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    model.save_pretrained(folder)
    config.update(dict(vocab_size=64, hidden_size=64, intermediate_size=64, head_dim=8))
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "small")
    # Else glibc would keep freed blocks of up to 32 MiB; and of busy cores, one does not wait for the other.
    environment = dict(MALLOC_MMAP_THRESHOLD_="8388608", OMP_NUM_THREADS="1")
    printed = run(SCRIPT, FOLDER=folder, OPTIONS=json.dumps([*OPTIONS]), **environment)
    shutil.rmtree(folder)
    return dict(item for line in printed.splitlines() for item in json.loads(line).items())


@pytest.mark.parametrize(("options", "layer"), OPTIONS.items())
def test_peak(peaks, options, layer):
    peak, held = peaks[options]
    assert held < peak < held + layer + MARGIN
