import pytest
import torch

from .models import make

collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Of a name (ours, transformers')."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("checkpoint"))
        return made[name]

    return get


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Which is fastest for models so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
