"""Builds the micro-kernels for the GPU of this machine, with nvcc alone."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent


def find_nvcc() -> str:
    for candidate in (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and Path(candidate).exists():
            return candidate
    raise FileNotFoundError("nvcc is neither $CUDACXX, on PATH nor in /usr/local/cuda/bin")


def gpu() -> tuple[str, tuple[int, int]]:
    """Name and compute capability of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0"]
    name, capability = subprocess.check_output(query, text=True).strip().rsplit(",", 1)
    major, minor = capability.strip().split(".")
    return name, (int(major), int(minor))


def target(capability: tuple[int, int]) -> str:
    """What nvcc compiles for: `80`, `89`, `90a`."""
    number = "".join(map(str, capability))
    return "90a" if number == "90" else number


def serves(needs: str, capability: tuple[int, int]) -> bool:
    """Whether the GPU has what a case needs."""
    if needs == "sm_90a":
        return capability == (9, 0)
    return capability >= (int(needs[3]), int(needs[4]))


def build(architecture: str, folder: Path | None = None) -> Path:
    """The library for an architecture, in `folder`; compiles the files side by side."""
    nvcc = find_nvcc()
    folder = folder or ROOT / "build" / "conformance"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O2", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
    flags += [f"-I{ROOT / 'tests'}", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    flags.append(f'-DWARPFORMER_CUDA_ARCHITECTURES="{architecture}"')

    def compile_file(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        # ptxas tells of every wgmma.fence that it adds itself: of use only where the build fails.
        command = [nvcc, *flags, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return target

    # wgmma's files take longest, and need an sm_90 or later.
    hopper = sorted(FOLDER.glob("wgmma*.cu")) if int(architecture.strip("af")) >= 90 else []
    sources = hopper + [path for path in sorted(FOLDER.glob("*.cu")) if not path.stem.startswith("wgmma")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_file, sources))
    library = folder / "conformance.so"
    subprocess.run([nvcc, "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library
