"""BLEU, chrF and loss of a translator on pairs of texts, as it was trained and in fewer bits.

    pip install 'warpformer[train]'
    python examples/translate/evaluate.py build/translator examples/data/bible.en-es.test.tsv

MODEL is what `warpformer train` made: it translates in float32 and in --quantization, and sacrebleu's paired
bootstrap tells how likely the difference is by chance. Or it is what `warpformer quantize` made of that,
which translates as it is. The loss is that of the reference's tokens, each predicted from those before it.
"""

import argparse
import time

import torch
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from tqdm import tqdm

import warpformer as wf
from warpformer.checkpoint import find_checkpoint, open_tokenizer, read_json
from warpformer.training import Seq2Seq, mean_loss, read_texts

INT4 = dict(mode="int4", group_size=32, clip="mse")
SAMPLES = 1000  # of the bootstrap


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=find_checkpoint, help="its folder")
    parser.add_argument("test", help="a tab-separated file")
    parser.add_argument("--columns", type=int, nargs=2, default=[1, 2], help="source and reference in it")
    parser.add_argument("--quantization", default="int8", help="to translate in, beside float32")
    parser.add_argument("--beams", type=int, default=4, help="1 is greedy")
    return parser.parse_args()


def print_losses(folder, texts, ways: dict[str, dict]):
    print("| | loss of a token | to the first |\n|---|---|---|")
    first = None
    for name, how in ways.items():
        model = wf.load(folder, dtype=torch.float32, **how)
        objective = Seq2Seq(texts, open_tokenizer(folder), max_length=model.config.max_length)
        loss = mean_loss(model, objective)
        first = first or loss
        print(f"| {name} | {loss:.4f} | {loss / first - 1:+.2%} |", flush=True)


def translations(folder, sources: list[str], how: dict, beams: int) -> tuple[list[str], float]:
    """Of each source, and the seconds of all."""
    translator = wf.Translator(folder, **how)
    start = time.perf_counter()
    with tqdm(total=len(sources), unit="text") as bar:
        found = translator.translate(sources, num_beams=beams, progress=bar.update)
    return found, time.perf_counter() - start


def print_scores(folder, texts, ways: dict[str, dict], beams: int):
    sources, references = texts.column(0), texts.column(1)
    metrics = {"BLEU": BLEU(), "chrF2": CHRF()}
    print(f"\n| {len(sources)} texts, {beams} beams | {' | '.join(metrics)} | seconds |")
    print("|---|---|---|---|")
    systems = []
    for name, how in ways.items():
        found, seconds = translations(folder, sources, how, beams)
        systems.append((name, found))
        scores = [f"{metric.corpus_score(found, [references]).score:.2f}" for metric in metrics.values()]
        print(f"| {name} | {' | '.join(scores)} | {seconds:.1f} |", flush=True)
    for name, metric in metrics.items():
        print(f"\n{name}: {metric.get_signature()}")
    if len(systems) > 1:
        _, rows = PairedTest(systems, metrics, [references], test_type="bs", n_samples=SAMPLES)()
        values = ", ".join(f"p = {rows[name][1].p_value:.3f} of {name}" for name in metrics)
        print(f"\npaired bootstrap of {SAMPLES} samples, {systems[1][0]} and float32: {values}")


def main():
    options = parse()
    texts = read_texts(options.test, options.columns)
    stored = read_json(options.model / "config.json").get("quantization_config")
    if stored is None:
        ways = {"float32": {}, options.quantization: {"quantization": options.quantization}}
        print_losses(options.model, texts, ways | {"int4, group 32": {"quantization": INT4}})
    else:
        ways = {" and ".join(sorted({group["format"] for group in stored["groups"]})): {}}
        print_losses(options.model, texts, ways)
    print_scores(options.model, texts, ways, options.beams)
    progress = read_json(options.model / "train.json")["result"]["progress"]
    print(f"\ntrained for {progress['seconds'] / 60:.0f} minutes")


if __name__ == "__main__":
    main()
