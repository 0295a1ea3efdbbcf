"""Threads are torch's: one OpenMP runtime, its thread count, and no hanging in forked processes."""

from tests.process import run

COUNT_THREADS = """
    import os, threading
    import torch, warpformer
    from warpformer import ops

    torch.set_num_threads(1)

    def started(function):
        "How many threads of the operating system the call starts and leaves behind."
        before = set(os.listdir("/proc/self/task"))
        function()
        return len(set(os.listdir("/proc/self/task")) - before)

    x = torch.randn(256, 512)
    weight = torch.randn(512, 512)
    packed = ops.pack_linear(weight)
    heads = torch.randn(2, 8, 128, 64)
    calls = [
        lambda: ops.softmax(x),
        lambda: ops.layer_norm(x, (512,)),
        lambda: ops.gelu(x),
        lambda: ops.embedding_sum([torch.zeros(256, dtype=torch.int64)], [x]),
        lambda: ops.pack_linear(weight),
        lambda: ops.linear(x, packed),
        lambda: ops.scaled_dot_product_attention(heads, heads, heads),
    ]
"""


def test_one_runtime():
    libraries = run("""
        import torch, warpformer
        torch.set_num_threads(2)
        warpformer.ops.softmax(torch.randn(256, 512))
        paths = {line.split()[-1] for line in open("/proc/self/maps")}
        print(*(p for p in paths if any(name in p for name in ("libgomp", "libomp", "libiomp"))))
    """)
    assert len(libraries.split()) == 1, libraries


def test_thread_count_is_obeyed_from_the_main_thread():
    out = run(
        COUNT_THREADS
        + """
    for threads in (1, 2, 3):  # the runtime keeps the threads it has
        torch.set_num_threads(threads)
        print(started(lambda: [call() for call in calls]))
    """
    )
    assert out.split() == ["0", "1", "1"]


def test_thread_count_is_obeyed_from_another_thread():
    out = run(
        COUNT_THREADS
        + """
    def in_thread(call):
        counts = []  # every thread has its own workers, and ends them
        thread = threading.Thread(target=lambda: counts.append(started(call)))
        thread.start()
        thread.join()
        return counts[0]

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        print(*(in_thread(call) for call in calls))
    """
    )
    assert [set(line.split()) for line in out.splitlines()] == [{"0"}, {"1"}, {"2"}], out


def test_forked_data_loader_worker():
    """Its parent has used several threads, which do not survive the fork."""
    out = run("""
        import torch
        from torch.utils.data import DataLoader, Dataset
        from warpformer import ops

        x = torch.randn(256, 512)

        class Rows(Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                heads = x.view(1, 4, 256, 128)
                attention = ops.scaled_dot_product_attention(heads, heads, heads)
                return attention, ops.linear(x, ops.pack_linear(x)), ops.softmax(x)

        torch.set_num_threads(2)
        expected = Rows()[0]
        loader = DataLoader(Rows(), num_workers=2, multiprocessing_context="fork", timeout=60)
        for results in loader:
            print(*(torch.equal(result[0], here) for result, here in zip(results, expected)))
    """)
    assert out.split() == ["True"] * 3 * 4
