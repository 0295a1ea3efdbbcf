"""Small runs of training."""

import csv

import torch
from safetensors.torch import load_file

from warpformer.models import transformer
from warpformer.models._config import read_config
from warpformer.training import Seq2Seq, Texts, TrainConfig, Trainer

SIZES = dict(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    max_position_embeddings=128,
)
OPTIONS = dict(max_tokens=500, warmup_steps=20)
TOML = """
out = "out"

[model]
model_type = "transformer"
dropout = 0.1
{sizes}

[tokenizer]
vocab_size = 400

[data]
train = "pairs.tsv"
valid = "pairs.tsv"
columns = [0, 1]
max_length = 128

[objective]
name = "seq2seq"
label_smoothing = 0.1

[train]
{options}
"""


def make_objective(pairs, tokenizer, rows=range(200), **options):
    rows = [pairs.rows[i] for i in rows]
    texts = Texts(pairs.path, rows, [range(len(rows))])
    return Seq2Seq(texts, tokenizer, **dict(max_length=128) | options)


def make_model(objective, tokenizer, **options):
    values = SIZES | objective.token_ids | dict(vocab_size=tokenizer.get_vocab_size()) | options
    torch.manual_seed(0)
    config = read_config(transformer.Config, values)
    return transformer.ConditionalGeneration(transformer.Model(config), config)


def make_trainer(pairs, tokenizer, out, *, model=None, valid=None, save=None, **options):
    objective = make_objective(pairs, tokenizer)
    model = make_model(objective, tokenizer) if model is None else model
    config = TrainConfig(**dict(max_steps=6, max_tokens=500, warmup_steps=4) | options)
    return Trainer(model, objective, config, out, valid=valid, save=save)


def read_log(
    out, columns=("step", "epoch", "tokens", "learning_rate", "loss", "gradient_norm", "valid_loss")
):
    """Rows of log.csv, without the time that differs."""
    with (out / "log.csv").open(newline="") as file:
        return [tuple(row[name] for name in columns) for row in csv.DictReader(file)]


def losses(out):
    return [float(loss) for (loss,) in read_log(out, ["loss"]) if loss]


def weights(out, step):
    return load_file(out / f"checkpoint-{step}" / "model.safetensors")


def write_config(folder, pairs, **options):
    """A file for `warpformer train`, and the texts that it names."""
    folder.mkdir(exist_ok=True)
    text = "".join(f"{english}\t{spanish}\n" for english, spanish in pairs.rows[:200])
    (folder / "pairs.tsv").write_text(text, encoding="utf-8")
    lines = ["\n".join(f"{key} = {value}" for key, value in d.items()) for d in (SIZES, OPTIONS | options)]
    path = folder / "run.toml"
    path.write_text(TOML.format(sizes=lines[0], options=lines[1]), encoding="utf-8")
    return path
