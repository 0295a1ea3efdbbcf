"""How likely texts are to a model that writes."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from warpformer import ops
from warpformer._C import InputError
from warpformer.generation.checks import as_tuple
from warpformer.generation.defaults import of_model
from warpformer.generation.prompts import longest_of
from warpformer.training.objectives.causal import stream_of
from warpformer.training.text import Texts

LOGITS = 1 << 25  # that are held at once
Progress = Callable[[int], object]


class Score(NamedTuple):
    """How likely a text is.

    Attributes:
        log_probs: [n] float32, log p of each of its tokens, given what stands before.
        greedy: [n] bool, whether each is the likeliest.
    """

    log_probs: Tensor
    greedy: Tensor

    @property
    def log_prob(self) -> float:
        """log p of the text: the sum."""
        return self.log_probs.double().sum().item()

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding writes this text."""
        return bool(self.greedy.all())

    @property
    def perplexity(self) -> float:
        """exp(-log_prob / n), of a token."""
        return math.exp(-self.log_probs.double().mean().item())


class Perplexity(NamedTuple):
    """How well a language model predicts texts.

    Attributes:
        loss: mean negative log-likelihood of a token, in nats.
        tokens: how many were predicted.
        bytes: UTF-8 bytes of the texts, the line breaks between their lines included.
    """

    loss: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss), of a token: models with other tokenizers have other ones."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """loss tokens / (bytes log 2), whatever the tokenizer."""
        return self.loss * self.tokens / (self.bytes * math.log(2))


class Row(NamedTuple):
    """Tokens [n + 1], of which a model reads all but the last and predicts the last `count`; and [m] that an
    encoder reads before."""

    tokens: Tensor
    count: int
    source: Tensor | None = None


def score(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    contexts: Sequence[str] | None = None,
    *,
    max_tokens: int = 8192,
    progress: Progress | None = None,
) -> list[Score]:
    """How likely each text is, after its context.

        log p(text | context) = sum over tokens t of text: log p(t | context, tokens of text before t)

    A language model reads bos_token_id first, if it has one; without one and without a context the first
    token is not counted. Context and text are tokenized together, and the tokens after those of the context
    alone are counted. Where all are more than the model reads, each sees at least half as many before it as
    that. The decoder of an encoder-decoder model reads decoder_start_token_id, and ends with eos_token_id,
    which counts.

    Args:
        model: a language or an encoder-decoder model, as `warpformer.load` returns it, in eval mode.
        texts: what is scored.
        tokenizer: the model's own, of the tokenizers library. Special tokens in a text are special tokens,
            unless its encode_special_tokens says otherwise.
        contexts: what stands before each text; what the encoder reads, of an encoder-decoder model.
        max_tokens: that are computed together, at least those of a text. It changes no score.
        progress: called with a number of texts when so many are scored.

    Returns:
        One Score for each text.

    Raises:
        InputError: there are not as many contexts as texts, or none for an encoder; a text leaves no token to
            predict, or is longer than an encoder-decoder model reads; a token is outside its vocabulary.
        TypeError: an input is not a text.

    Source: loglikelihood of the Language Model Evaluation Harness (Gao et al., 2021).
    """
    given = [""] * len(texts) if contexts is None else contexts
    if len(given) != len(texts):
        raise InputError(f"score: there are {len(given)} contexts of {len(texts)} texts")
    for text in (*texts, *given):
        if not isinstance(text, str):
            raise TypeError(f"score: texts must be strings, one is {type(text).__name__}")
    if hasattr(model, "encode"):
        if contexts is None:
            raise InputError("score: an encoder-decoder model needs contexts, which its encoder reads")
        pieces = [[row] for row in decoder_rows(model, texts, tokenizer, given)]
    else:
        pieces = [decoder_only_rows(model, *of, tokenizer) for of in zip(texts, given, strict=True)]
    for text, rows in zip(texts, pieces, strict=True):
        if not sum(row.count for row in rows):
            raise InputError(f"score: {text[:40]!r} leaves no token to predict")
    owners = [i for i, rows in enumerate(pieces) for _ in rows]
    left = [len(rows) for rows in pieces]
    found: dict[int, Score] = {}
    rows = [row for rows in pieces for row in rows]
    for index, part in predicted(model, rows, max_tokens):
        found[index] = part
        left[owners[index]] -= 1
        if progress is not None and not left[owners[index]]:
            progress(1)
    parts = [[] for _ in texts]
    for index, owner in enumerate(owners):
        parts[owner].append(found[index])
    return [Score(*map(torch.cat, zip(*of_text, strict=True))) for of_text in parts]


def perplexity(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Texts,
    *,
    window: int = 512,
    stride: int | None = None,
    int8_cache: bool = False,
    progress: Progress | None = None,
) -> Perplexity:
    """The perplexity of a language model on texts. A document begins behind eos_token_id and ends with it,
    which is predicted, too.

    Args:
        model: a language model in eval mode, as `warpformer.load` returns it.
        tokenizer: its own.
        texts: of one column.
        window, stride: as in `token_losses`; half a window if None.
        int8_cache, progress: as in `token_losses`.

    Raises:
        InputError: the texts have several columns, window or stride does not fit; the model has no
            eos_token_id.
    """
    ends = as_tuple(of_model(model, "eos_token_id"))
    if not ends:
        raise InputError("perplexity: the model has no eos_token_id, which stands between documents")
    tokens = torch.from_numpy(stream_of(texts, tokenizer, ends[0])).long()
    stride = max(1, window // 2) if stride is None else stride
    options = dict(window=window, stride=stride, int8_cache=int8_cache, progress=progress)
    losses = token_losses(model, tokens, **options)
    line_breaks = len(texts.rows) - len(texts.documents)
    size = sum(len(text.encode()) for text in texts.column()) + line_breaks
    return Perplexity(losses.double().mean().item(), len(losses), size)


def token_losses(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int,
    stride: int,
    max_tokens: int = 8192,
    int8_cache: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """The negative log-likelihood of each token of a text but the first, in float32.

        out[t - 1] = -log p(tokens[t] | tokens[max(0, e - window) : t])        e, the end of the window of t:
        e = window for the first `window` tokens after tokens[0], then it moves on by `stride`

    so that each token is counted once, with all tokens before it or at least window - stride + 1 of them.

    Args:
        model: a language model, as `warpformer.load` returns it, in eval mode.
        tokens: [N] int64, of one text.
        window: tokens that the model reads at once.
        stride: from 1 (each token with as many before it as there can be) to window (blocks).
        max_tokens: that are computed together, at least a window.
        int8_cache: all tokens but the first of a window attend to the keys and values of an int8 KVCache, as
            in decoding.
        progress: called with a number of tokens when so many are predicted.

    Returns:
        [N - 1].

    Raises:
        InputError: stride is not in 1 .. window, or there is no token to predict; an id is outside the
            vocabulary.

    Source: the sliding window of "Perplexity of fixed-length models" in the documentation of transformers.
    """
    if not 1 <= stride <= window:
        raise InputError(f"token_losses: stride = {stride} is not in 1..window = {window}")
    if len(tokens) < 2:
        raise InputError(f"token_losses: {len(tokens)} tokens leave none to predict")
    rows, losses = windows(tokens, window, stride), {}
    for index, part in predicted(model, rows, max_tokens, int8_cache):
        losses[index] = -part.log_probs
        if progress is not None:
            progress(rows[index].count)
    return torch.cat([losses[index] for index in range(len(rows))])


def windows(tokens: Tensor, window: int, stride: int) -> list[Row]:
    """Of tokens [N] rows that predict each but the first once, as `token_losses` has it."""
    targets = len(tokens) - 1
    length = min(window, targets)
    ends = [*range(length, targets, stride), targets]
    counts = [length, *(end - before for before, end in pairwise(ends))]
    return [Row(tokens[end - length : end + 1], count) for end, count in zip(ends, counts, strict=True)]


def decoder_only_rows(model, text: str, context: str, tokenizer: Tokenizer) -> list[Row]:
    """The windows of a text behind its context."""
    begin = as_tuple(of_model(model, "bos_token_id"))[:1]
    before = len(tokenizer.encode(context, add_special_tokens=False).ids)
    ids = torch.tensor([*begin, *tokenizer.encode(context + text, add_special_tokens=False).ids])
    count = len(ids) - max(1, len(begin) + before)
    if count < 1:
        return []
    window = longest_of(model) or len(ids)
    rows, behind = [], count  # tokens of the text from here on
    for row in reversed(windows(ids, window, max(1, window // 2))):
        rows.append(row._replace(count=min(row.count, behind)))
        behind -= rows[-1].count
        if not behind:
            break
    return rows[::-1]


def decoder_rows(model, texts, tokenizer: Tokenizer, sources) -> Iterator[Row]:
    """Of an encoder-decoder model."""
    first, ends = of_model(model, "decoder_start_token_id"), as_tuple(of_model(model, "eos_token_id"))
    if first is None or not ends:
        raise InputError("score: the model has no decoder_start_token_id, or no eos_token_id")

    def ended(text):
        ids = tokenizer.encode(text).ids
        return ids if ids[-1:] and ids[-1] in ends else [*ids, ends[0]]

    longest = longest_of(model)
    for text, source in zip(texts, sources, strict=True):
        target, read = ended(text), ended(source)
        if longest is not None and max(len(target), len(read)) > longest:
            counts = f"{len(target)} tokens behind {len(read)}, and the model reads {longest}"
            raise InputError(f"score: {text[:40]!r} has {counts}")
        yield Row(torch.tensor([first, *target]), len(target), torch.tensor(read))


def predicted(
    model, rows: Sequence[Row], max_tokens: int, int8_cache: bool = False
) -> Iterator[tuple[int, Score]]:
    """(i, of the last rows[i].count tokens of row i), in batches of rows of like lengths, longest first."""
    sizes = [len(row.tokens) - 1 + (0 if row.source is None else len(row.source)) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -sizes[i])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // sizes[order[start]])
        batch = order[start : start + size]
        start += size
        found = predicted_together(model, [rows[i] for i in batch], int8_cache)
        yield from zip(batch, found, strict=True)


@torch.no_grad()
def predicted_together(model, rows: Sequence[Row], int8_cache: bool) -> list[Score]:
    device = next(model.parameters()).device
    ids, mask = padded([row.tokens[:-1] for row in rows], device)
    lengths = [len(row.tokens) - 1 for row in rows]
    forward = model.backbone.forward_rows
    if rows[0].source is not None:
        given = padded([row.source for row in rows], device)
        hidden = forward(*given, decoder_input_ids=ids, decoder_attention_mask=mask)[0].split(lengths)
    elif int8_cache and max(lengths) > 1:
        cache = model.make_cache(dtype=torch.int8)
        first = forward(ids[:, :1], cache=cache)[0].split(
            1
        )  # those of a first call see each other as they are
        others = forward(ids[:, 1:], mask[:, 1:], cache=cache)[0].split([length - 1 for length in lengths])
        hidden = [torch.cat(pair) for pair in zip(first, others, strict=True)]
    else:
        hidden = forward(ids, mask)[0].split(lengths)
    counts = [row.count for row in rows]
    counted = torch.cat([of_row[-count:] for of_row, count in zip(hidden, counts, strict=True)])
    labels = torch.cat([row.tokens[-row.count :] for row in rows]).to(device)
    size = max(1, LOGITS // model.config.vocab_size)
    parts = [of_labels(model, *part) for part in zip(counted.split(size), labels.split(size), strict=True)]
    return list(map(Score, *(torch.cat(part).split(counts) for part in zip(*parts, strict=True))))


def of_labels(model, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log p [n] of tokens [n] behind hidden states [n, C], and whether they are the likeliest."""
    logits = model.logits(hidden).float()
    return -ops.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels


def padded(rows: Sequence[Tensor], device) -> tuple[Tensor, Tensor]:
    """[B, T] of tokens, at the left, and where they are."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence(list(rows), batch_first=True)
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)
