"""Whether an installed warpformer works with the torch beside it: a few ops, and one OpenMP runtime."""

from pathlib import Path

import torch
import torch.nn.functional as F

import warpformer as wf


def check(ours, theirs, *inputs):
    """`ours` is as close to float64 as torch's kernel (and 10 %), or as half the spacing of its dtype."""
    truth = theirs(*(x.double() for x in inputs))

    def error(out):
        return ((out.double() - truth).norm() / truth.norm()).item()

    out = ours(*inputs)
    allowed = max(1.1 * error(theirs(*inputs)), torch.finfo(out.dtype).eps / 2)
    assert error(out) <= allowed, f"{ours.__name__} in {out.dtype}: error {error(out)}, allowed {allowed}"


def openmp_runtimes() -> set[str]:
    """The files of this process's memory map that are an OpenMP runtime."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return {file for file in files if Path(file).name.startswith(("libgomp", "libiomp", "libomp"))}


def main() -> None:
    print(f"warpformer {wf.__version__} from {Path(wf.__file__).parent}, torch {torch.__version__}")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 33, 96, dtype=dtype)
        query, key, value = (torch.randn(2, 3, 65, 32, dtype=dtype) for _ in range(3))
        check(wf.ops.softmax, lambda x: F.softmax(x, -1), x)
        check(wf.ops.gelu, F.gelu, x)
        check(lambda x: wf.ops.layer_norm(x, (96,)), lambda x: F.layer_norm(x, (96,)), x)
        check(wf.ops.scaled_dot_product_attention, F.scaled_dot_product_attention, query, key, value)
        print(f"softmax, gelu, layer_norm and attention are right in {dtype}")

    runtimes = openmp_runtimes()
    assert len(runtimes) == 1, f"{len(runtimes)} OpenMP runtimes are loaded: {sorted(runtimes)}"
    print(f"one OpenMP runtime: {runtimes.pop()}")


if __name__ == "__main__":
    main()
