import os

import pytest
import torch

# Without it deterministic algorithms refuse torch's products on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]


@pytest.fixture(autouse=True)
def _outputs_start_as_nan():
    """torch.empty, which makes every output, then fills it with NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
