from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from warpformer import ops
from warpformer.generation.beam_results import Results, best_results, greatest, is_done
from warpformer.generation.checks import require
from warpformer.generation.config import GenerationConfig
from warpformer.generation.decoding import Decoding
from warpformer.generation.history import History
from warpformer.generation.rules import Rules


def beam_search(decoding: Decoding, logits: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """The best num_return_sequences of each row: new tokens [R, new], their log-probabilities, and the worths
    [R].

    At every step a search has its best candidates, beams and one token more. Those that end compete for its
    results, by their worth; the best of the others run on. It is done when its results cannot become better,
    as `early_stopping` has it. Each row has num_beam_groups searches.

    Args:
        logits: [B, V] of the first new token.

    Source: transformers' GenerationMixin._beam_search; for groups Vijayakumar et al., "Diverse Beam Search",
    as transformers 4 has it, with penalties that stay in the scores of beams.
    """
    config, (batch, vocabulary) = rules.config, logits.shape
    require(
        candidates(config) <= vocabulary,
        f"num_beams = {config.num_beams} are too many for a vocabulary of {vocabulary}",
    )
    # Of all rows the first group, then the second...
    searches = torch.arange(batch * config.num_beam_groups, device=logits.device)  # that are not done
    if config.num_beam_groups > 1:
        decoding.repeat_(searches % batch)
        logits = logits[searches % batch]
    decoding.history = decoding.history.with_log_probs()
    # The same memory at every step: new pages would take longer than what is written there.
    memory = torch.empty(len(searches) * config.beams, vocabulary, device=logits.device)
    scores = torch.zeros(len(searches), 1, device=logits.device)  # of the beams: at first one, the prompt
    found, results = [], Results.none(len(searches), config, logits.device)
    while True:
        step = best_candidates(decoding.history, logits, scores, searches, batch, rules, memory)
        del logits  # the next ones get its memory, in place of new pages
        if bool(step.ends[:, : config.beams].any()):
            results = results.merged(step.ended(config), config)
        history, scores, parents = step.running(config.beams)
        done = is_done(results, scores, history, config)
        found.append((searches[done], results.select(done)))
        if bool(done.all()):
            best = best_results(found, batch, config)
            return best.tokens, best.log_probs, best.worths
        if bool(done.any()):
            searches, results, scores = searches[~done], results.select(~done), scores[~done]
            beams = (~done).repeat_interleave(config.beams)
            history, parents = history.select(beams), parents[beams]
        logits = decoding.step(history, parents).select(1, -1)


def candidates(config: GenerationConfig) -> int:
    """Of a search: with every beam ending at each eos, so many leave as many running beams."""
    return config.beams * (1 + max(1, len(config.eos_token_ids)))


class Candidates(NamedTuple):
    """The best beams of searches with one token more, the best first.

    Attributes:
        scores: [S, candidates].
        parents: [S, candidates] the rows of `history` that they go on from.
        tokens: [S, candidates].
        log_probs: [S, candidates] of the tokens.
        ends: [S, candidates] whether they end.
        history: of the beams.
    """

    scores: Tensor
    parents: Tensor
    tokens: Tensor
    log_probs: Tensor
    ends: Tensor
    history: History

    def ended(self, config: GenerationConfig) -> Results:
        """Those of the best `beams` that end."""
        ends, index = self.ends[:, : config.beams], torch.arange(config.beams, device=self.ends.device)
        history = self.extended(index.expand(ends.shape))
        sizes = history.new.view(ends.shape)
        worths = self.scores[:, : config.beams] / sizes**config.length_penalty
        shape = *ends.shape, -1
        tokens, log_probs = history.tokens[:, -history.log_probs.shape[1] :], history.log_probs
        worths = worths.masked_fill(~ends, -torch.inf)
        return Results(worths, sizes, tokens.view(shape), log_probs.view(shape))

    def extended(self, index: Tensor) -> History:
        """Those that `index` [S, n] has, as S n rows."""
        parents, tokens, log_probs = (
            t.gather(1, index).flatten() for t in (self.parents, self.tokens, self.log_probs)
        )
        return self.history.select(parents).append(tokens, log_probs)

    def running(self, count: int) -> tuple[History, Tensor, Tensor]:
        """The best that do not end: S count rows, their scores [S, count], and whose children they are."""
        scores, index = greatest(self.scores.masked_fill(self.ends, -torch.inf), count)
        return self.extended(index), scores, self.parents.gather(1, index).flatten()


class Best(NamedTuple):
    """The best next tokens of beams, the best first: their scores, which they are, and their
    log-probabilities, [R, candidates] each."""

    scores: Tensor
    tokens: Tensor
    log_probs: Tensor


def best_candidates(
    history: History,
    logits: Tensor,
    scores: Tensor,
    searches: Tensor,
    batch: int,
    rules: Rules,
    memory: Tensor,
) -> Candidates:
    """Of all searches, one group after the other.

    Args:
        history: of the beams, S held rows; logits: [S held, V] of their next tokens.
        scores: [S, held] of the beams.
        searches: [S], of which search s is of row s % batch and in group s // batch.
        memory: [at least S held, V], to work in.
    """
    config, held = rules.config, scores.shape[1]
    if config.num_beam_groups == 1 and rules.bans is not None:
        return candidates_of(history, best_by_logits(history, logits, rules), scores, 0, rules)
    log_probs = ops.log_softmax(logits, -1, out=memory[: len(logits)])
    of_tokens = rules.scores(history, log_probs)
    if config.num_beam_groups == 1:
        return candidates_of(history, best_of(of_tokens, log_probs, config), scores, 0, rules)
    penalties = torch.zeros(batch, logits.shape[1], device=logits.device)
    groups, first = [], 0
    for size in (searches // batch).bincount(minlength=config.num_beam_groups).tolist():
        members = slice(first, first + size)
        beams, rows = slice(first * held, (first + size) * held), searches[members] % batch
        penalized = of_tokens[beams] - penalties[rows].repeat_interleave(held, 0)
        best = best_of(penalized, log_probs[beams], config)
        groups.append(candidates_of(history, best, scores[members], beams.start, rules))
        penalize(penalties, rows, groups[-1], config)
        first += size
    parts = zip(*(group[:-1] for group in groups), strict=True)  # all but the history
    return Candidates(*(torch.cat(part) for part in parts), history)


def best_of(scores: Tensor, log_probs: Tensor, config: GenerationConfig) -> Best:
    """Of scores [R, V]."""
    values, tokens = ops.top_k(scores, candidates(config))
    return Best(values, tokens, log_probs.gather(1, tokens))


def best_by_logits(history: History, logits: Tensor, rules: Rules) -> Best:
    """Where nothing but bans changes scores: among so many more as are banned there are enough."""
    count, vocabulary = candidates(rules.config), logits.shape[1]
    most = min(vocabulary, count + sum(len(ban.tokens) for ban in rules.bans))
    log_probs, tokens = ops.top_k(logits, most, log_softmax=True)
    scores = log_probs
    for ban in rules.bans:
        scores = scores.masked_fill(ban.meets(history, tokens), -torch.inf)
    scores, index = greatest(scores, count)
    return Best(scores, tokens.gather(1, index), log_probs.gather(1, index))


def candidates_of(history: History, best: Best, scores: Tensor, first: int, rules: Rules) -> Candidates:
    """The candidates of searches, whose beams are the rows of `history` from `first` on.

    Args:
        best: of these beams; their scores are [S, held].
    """
    (size, held), count = scores.shape, best.scores.shape[1]
    # The best of a search are among the best of its beams; of equal ones the first comes first.
    scores, index = greatest((best.scores.view(size, held, count) + scores[..., None]).flatten(1), count)
    parents = first + index // count + held * torch.arange(size, device=index.device)[:, None]
    tokens, log_probs = (t.view(size, held * count).gather(1, index) for t in best[1:])
    ends = rules.ends(history.select(parents.flatten()).append(tokens.flatten(), scores.flatten()))
    return Candidates(scores, parents, tokens, log_probs, ends.view_as(tokens), history)


def penalize(penalties: Tensor, rows: Tensor, group: Candidates, config: GenerationConfig):
    """Adds diversity_penalty to those [B, V] of the tokens of a group's best beams, eos_token_id apart."""
    eos = torch.tensor(config.eos_token_ids, dtype=torch.int64, device=rows.device)
    scores = group.scores.masked_fill(torch.isin(group.tokens, eos), -torch.inf)
    scores, index = greatest(scores, config.beams)
    values = config.diversity_penalty * (scores > -torch.inf).to(penalties.dtype)
    tokens = group.tokens.gather(1, index)
    penalties.index_put_((rows[:, None].expand_as(tokens), tokens), values, accumulate=True)
