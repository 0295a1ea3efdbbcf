"""A torch.nn classifier on our kernels by one line. Both learn from the same batches, and are timed in turns.

    python examples/torch_layers.py
    python examples/torch_layers.py --steps 30 --width 64    # seconds

It reads the bytes of a verse and tells whether they are English or Spanish.
"""

import argparse
import copy
import random
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from tqdm import tqdm

import warpformer as wf

DATA = Path(__file__).parent / "data"
LENGTH = 128  # bytes of a verse that are read


class Classifier(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, 2)

    def forward(self, text: Tensor) -> Tensor:
        """text: [B, T] bytes, 0 behind the end -> [B, 2]"""
        padding = text == 0
        x = self.bytes(text) + self.positions.weight[: text.shape[1]]
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.head(x.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True))


def read_verses(split: str) -> list[tuple[bytes, int]]:
    """Every verse in English (0) and in Spanish (1)."""
    lines = (DATA / f"bible.en-es.{split}.tsv").read_text(encoding="utf-8").splitlines()
    return [(text.encode(), label) for line in lines for label, text in enumerate(line.split("\t")[1:])]


def batch(verses) -> tuple[Tensor, Tensor]:
    texts, labels = zip(*verses, strict=True)
    rows = [torch.tensor([*text[:LENGTH]]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(labels)


def train_step(model, optimizer, text, label) -> float:
    loss = nn.functional.cross_entropy(model(text), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model, text, label) -> float:
    return (model(text).argmax(1) == label).float().mean().item()


def timed(function, *arguments):
    start = perf_counter()
    result = function(*arguments)
    return result, perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)

    theirs = Classifier(options.width, options.layers)
    ours = copy.deepcopy(theirs)
    print(wf.patch_(ours))  # the line

    models = {"torch": theirs, "warpformer": ours}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=3e-4) for name, model in models.items()}
    train = read_verses("train")
    losses, steps, forwards = ({name: [] for name in models} for _ in range(3))
    for _ in tqdm(range(options.steps), "Training both", unit="step"):
        inputs = batch(random.sample(train, options.batch_size))
        for name, model in models.items():
            loss, seconds = timed(train_step, model, optimizers[name], *inputs)
            losses[name].append(loss)
            steps[name].append(seconds)

    test = batch(random.sample(read_verses("test"), 128))
    right = {}
    for _ in range(5):
        for name, model in models.items():
            right[name], seconds = timed(accuracy, model.eval(), *test)
            forwards[name].append(seconds)

    print(f"{'':12}{'first loss':>12}{'last loss':>12}{'accuracy':>10}{'ms a step':>12}{'ms to test':>12}")
    for name in models:
        print(
            f"{name:12}{losses[name][0]:12.4f}{losses[name][-1]:12.4f}{right[name]:10.1%}"
            f"{1e3 * median(steps[name]):12.1f}{1e3 * median(forwards[name]):12.1f}"
        )
    for what, seconds in {"training": steps, "inference": forwards}.items():
        ratio = median(seconds["torch"]) / median(seconds["warpformer"])
        print(f"{what}: {ratio:.2f} times as fast as torch")


if __name__ == "__main__":
    main()
