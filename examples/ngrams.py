"""Models that know nothing but counts: what a neural one is to be compared with."""

import numpy as np


class Unigram:
    """p(token) = (count of token + 1) / (count of all + vocab_size), of what was seen in training."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        counts = np.bincount(tokens, minlength=vocab_size) + 1
        self.probabilities = counts / counts.sum()

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """-log p of each token, in nats."""
        return -np.log(self.probabilities[tokens])


class KneserNeyBigram:
    """The next token by the one before it, with discounts D and D' of what was seen.

        p(w | v) = (max(c(v w) - D, 0) + D kinds(v .) q(w)) / c(v .)        q(w) where v was never followed
        q(w)     = (max(kinds(. w) - D', 0) + D' words / vocab_size) / kinds(. .)

    c counts pairs, kinds counts different ones, words those w that follow anything: how many tokens w has
    followed says more of it after a new one than how often it came. D = n1 / (n1 + 2 n2) of the n1 pairs
    that were seen once and the n2 seen twice, or 1/2 where none was seen once; D' likewise of kinds(. w).
    Source: Kneser and Ney, "Improved backing-off for M-gram language modeling"; Chen and Goodman, "An
    Empirical Study of Smoothing Techniques for Language Modeling" (interpolated).
    """

    def __init__(self, before: np.ndarray, tokens: np.ndarray, vocab_size: int):
        self.vocab_size = vocab_size
        self.pairs, self.counts = np.unique(self.key(before, tokens), return_counts=True)
        first, second = np.divmod(self.pairs, vocab_size)
        self.followed = np.bincount(first, self.counts, minlength=vocab_size)  # c(v .)
        self.kinds = np.bincount(first, minlength=vocab_size)  # kinds(v .)
        self.discount = discount(self.counts)

        kinds = np.bincount(second, minlength=vocab_size)  # kinds(. w)
        lower = discount(kinds)
        rest = lower * np.count_nonzero(kinds) / vocab_size
        self.continuation = (np.maximum(kinds - lower, 0) + rest) / len(self.pairs)  # q

    def key(self, before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return before.astype(np.int64) * self.vocab_size + tokens

    def probabilities(self, before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """p(tokens | before), of each pair."""
        keys = self.key(before, tokens)
        places = np.searchsorted(self.pairs, keys).clip(max=len(self.pairs) - 1)
        counts = np.where(self.pairs[places] == keys, self.counts[places], 0)
        seen = np.maximum(counts - self.discount, 0) + (
            self.discount * self.kinds[before] * self.continuation[tokens]
        )
        known = self.followed[before] > 0
        return np.where(known, seen / np.maximum(self.followed[before], 1), self.continuation[tokens])

    def losses(self, before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """-log p of each token, in nats."""
        return -np.log(self.probabilities(before, tokens))


def discount(counts: np.ndarray) -> float:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return once / (once + 2 * twice) if once else 0.5


def entropy(tokens: np.ndarray) -> float:
    """Nats a token by the tokens' own frequencies: what the best of all unigram models would lose on them."""
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(shares * np.log(shares)).sum())
