"""Four ways to learn a language from text alone, each with a small model of its kind, on English verses.

    pip install 'warpformer[train]'
    python examples/pretrain.py --objective causal             # Llama: the next token
    python examples/pretrain.py --objective mlm-nsp            # BERT: masked tokens, next sentences
    python examples/pretrain.py --objective denoising          # BART: the text out of what noise left
    python examples/pretrain.py --objective span-corruption    # T5: the spans that are missing
    python examples/pretrain.py --objective causal --small     # seconds, on a part of the verses

examples/pretrain/ has a configuration of each, as `warpformer train` reads them: minutes on one core.
The held-out verses then tell whether anything was learned, in nats a token, beside models that only count:
the causal one must be better than a Kneser-Ney bigram model, the others better by 1 than a unigram model.
Those count the same kind of tokens in training, and are asked for the very tokens that the neural one is.
Beside them is the best of all unigram models, which knows beforehand how often each of these occurs.
Sentinels and tokens that can be copied are easy: what the source hides has a row of its own. The status is 1
where a row is not below its bar. At last: what does the model make of "The cat [MASK] on the table"?
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ngrams import KneserNeyBigram, Unigram, entropy
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import warpformer as wf
from warpformer.training import OBJECTIVES, Objective, read_texts, run

HERE = Path(__file__).parent
NAMES = ("causal", "mlm-nsp", "denoising", "span-corruption")
BATCH = 32  # examples that are tested at a time
DRAWS = 4  # of what the held-out text hides: few tokens have less entropy than what they are drawn from


def read_config(options) -> run.RunConfig:
    config = run.read_run_config(HERE / "pretrain" / f"{options.objective}.toml")
    config.train.max_minutes = options.minutes
    if options.out is not None:
        config.out = str(options.out)
    if options.small:
        config.data.train, config.data.valid = config.data.valid, None
        config.train.max_steps, config.train.warmup_steps, config.train.max_tokens = 20, 10, 1000
    return config


def make_objective(config: run.RunConfig, path: str, tokenizer: Tokenizer) -> Objective:
    chosen = {key: value for key, value in config.objective.items() if key != "name"}
    return OBJECTIVES[config.objective["name"]](
        read_texts(path, config.data.columns), tokenizer, max_length=config.data.max_length, **chosen
    )


class Targets(NamedTuple):
    """Tokens that an objective asks for."""

    tokens: np.ndarray
    before: np.ndarray | None  # the token before each, of causal models
    hidden: np.ndarray | None  # whether the source has it not, of encoder-decoder models

    @classmethod
    def of(cls, examples) -> "Targets":
        def joined(key):
            return np.concatenate([example[key] for example in examples]) if key in examples[0] else None

        is_seq2seq = "target" in examples[0]
        before = None if is_seq2seq or "places" in examples[0] else joined("tokens")
        return cls(joined("target" if is_seq2seq else "labels"), before, joined("hidden"))

    def take(self, chosen: np.ndarray) -> "Targets":
        return Targets(*(None if values is None else values[chosen] for values in self))


@torch.no_grad()
def test(model, objective: Objective, draws: int) -> tuple[Targets, np.ndarray, list[bool]]:
    """Targets of all examples, as many times drawn; the loss of each; and of each pair of segments whether it
    was told right."""
    examples = [
        objective.example(index, draw) for draw in range(draws) for index in range(objective.examples)
    ]
    losses, right = [], []
    for start in tqdm(range(0, len(examples), BATCH), "Testing", unit="batch"):
        batch = objective.collate(examples[start : start + BATCH])
        logits, follows = objective.logits(model, batch), None
        if hasattr(batch, "pairs"):
            logits, follows = objective.outputs(model, batch)
            right += (follows.argmax(1) == batch.pairs).tolist()
        losses.append(wf.ops.cross_entropy(logits, batch.labels, reduction="none"))
    return Targets.of(examples), torch.cat(losses).numpy(), right


def baselines(seen: Targets, targets: Targets, vocab_size: int) -> dict[str, float]:
    """The mean losses of models that counted what was seen."""
    losses = {"unigram": Unigram(seen.tokens, vocab_size).losses(targets.tokens).mean()}
    if targets.before is None:
        return losses | {"best unigram": entropy(targets.tokens)}
    bigram = KneserNeyBigram(seen.before, seen.tokens, vocab_size)
    return losses | {"Kneser-Ney bigram": bigram.losses(targets.before, targets.tokens).mean()}


def report(seen: Targets, targets: Targets, losses: np.ndarray, vocab_size: int) -> bool:
    """Prints a row for all targets, and one for the hidden; whether each is below its bar."""
    is_below = []
    for name in ("all targets", "hidden tokens"):
        if name == "hidden tokens":
            if targets.hidden is None:
                break
            losses = losses[targets.hidden]
            seen, targets = seen.take(seen.hidden), targets.take(targets.hidden)
        counted = baselines(seen, targets, vocab_size)
        bar = counted["unigram"] - 1 if targets.before is None else counted["Kneser-Ney bigram"]
        if not is_below:
            print(
                f"{'':15}{'tokens':>8}{'loss':>9}" + "".join(f"{key:>20}" for key in counted) + f"{'bar':>9}"
            )
        others = "".join(f"{value:20.3f}" for value in counted.values())
        print(f"{name:15}{len(losses):8}{losses.mean():9.3f}{others}{bar:9.3f}")
        is_below.append(losses.mean() < bar)
    return all(is_below)


def write_on(model, tokenizer: Tokenizer):
    line_break = tokenizer.encode("\n").ids  # which is between two verses

    def ids(text):
        return torch.tensor([line_break + tokenizer.encode(text).ids])

    written = model.generate(ids("The cat"), max_new_tokens=30, eos_token_id=line_break[-1])
    print(f"The cat ...  {tokenizer.decode(written[0].tolist()).strip()}")
    for word in ("sat", "is", "was", "table"):
        tokens = ids(f"The cat {word} on the table.")
        losses = wf.ops.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:], reduction="none")
        print(f"log p(The cat {word} on the table.) = {-losses.sum():.2f}")


def fill_in(model, tokenizer: Tokenizer):
    ids = source(tokenizer, "The cat <mask> on the table.", begin="<s>")
    logits = model(ids).prediction_logits[ids == tokenizer.token_to_id("<mask>")][0]
    for share, token in zip(*logits.softmax(0).topk(5), strict=True):
        print(f"{share:6.1%}  The cat{tokenizer.decode([int(token)])} on the table.")


def restore(model, tokenizer: Tokenizer):
    written = model.generate(
        source(tokenizer, "The cat <mask> on the table.", begin="<s>"), max_new_tokens=30, num_beams=4
    )
    print(f"The cat <mask> on the table.  ->  {tokenizer.decode(written[0].tolist())}")


def name_spans(model, tokenizer: Tokenizer):
    written = model.generate(source(tokenizer, "The cat <extra_id_0> on the table."), max_new_tokens=30)
    answer = tokenizer.decode(written[0, 1:].tolist(), skip_special_tokens=False)
    print(f"The cat <extra_id_0> on the table.  ->  {answer}")


def source(tokenizer: Tokenizer, text: str, begin: str = "") -> Tensor:
    """[1, T], what an encoder reads."""
    return torch.tensor([tokenizer.encode(f"{begin}{text}</s>").ids])


ASK = dict(zip(NAMES, (write_on, fill_in, restore, name_spans), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--objective", choices=NAMES, required=True)
    parser.add_argument("--out", type=Path, help="folder of the run; else build/pretrain/<objective>")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    parser.add_argument("--minutes", type=float, default=14, help="of training, at most")
    parser.add_argument("--small", action="store_true", help="20 steps on 508 verses")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    run.log.setLevel(logging.INFO)

    config = read_config(options)
    with logging_redirect_tqdm():
        result = run.train(config, resume=options.resume)
    if result.signal is not None:
        print("Stopped; --resume goes on", file=sys.stderr)
        return 128 + result.signal

    model, tokenizer = wf.load(config.out), Tokenizer.from_file(f"{config.out}/tokenizer.json")
    trained = make_objective(config, config.data.train, tokenizer)
    held_out = make_objective(config, HERE / "data" / "bible.en-es.test.tsv", tokenizer)
    draws = 1 if options.small or options.objective == "causal" else DRAWS
    targets, losses, right = test(model, held_out, draws)
    seen = Targets.of([trained.example(index, 0) for index in range(trained.examples)])
    progress = result.progress
    print(f"{progress.step} steps, {progress.tokens} tokens, {progress.seconds / 60:.1f} minutes")
    is_below = report(seen, targets, losses, tokenizer.get_vocab_size())
    if right:
        print(f"next sentence  {len(right):8}{np.mean(right):9.1%} right")
    print("learned: each loss is below its bar" if is_below else "not learned: a loss is not below its bar")
    with torch.no_grad():
        ASK[options.objective](model, tokenizer)
    return 0 if is_below else 1


if __name__ == "__main__":
    sys.exit(main())
