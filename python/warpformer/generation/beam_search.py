import torch
import torch.nn.functional as F
from torch import Tensor

from warpformer import ops
from warpformer.generation.config import GenerationConfig, require
from warpformer.generation.decoding import Decoding


def beam_search(decoding: Decoding, logits: Tensor, config: GenerationConfig) -> Tensor:
    """New tokens [B, new] of the best beam of each row.

    At every step each row has its best candidates, beams and one token more. Those that end compete for the
    row's `num_beams` results, by their worth; the best of the others run on. A row is done when its results
    cannot become better, as `early_stopping` has it.

    Args:
        logits: [B, V] of the first new token.

    Source: transformers' GenerationMixin._beam_search.
    """
    batch, vocabulary = logits.shape
    count, longest = config.num_beams, config.max_new_tokens
    # With every beam ending at each eos, so many candidates leave as many running beams.
    candidates = count * (1 + max(1, len(config.eos_token_ids)))
    require(candidates <= vocabulary, f"num_beams = {count} are too many for a vocabulary of {vocabulary}")
    eos = torch.tensor(config.eos_token_ids, dtype=torch.int64, device=logits.device)

    best = torch.full((batch, longest), config.padding, device=logits.device)
    lengths = torch.zeros(batch, dtype=torch.int64, device=logits.device)  # of the best
    rows = torch.arange(batch, device=logits.device)  # that are not done
    scores = logits.new_zeros(batch, 1)  # log-probabilities of the beams: at first one, the prompt
    beams = best[:, None, :0]  # [rows, beams, tokens]
    worths = logits.new_full((batch, count), -torch.inf)
    results = best[:, None].expand(-1, count, -1)
    sizes = lengths[:, None].expand(-1, count)  # of the results
    for length in range(1, longest + 1):
        scores = ops.log_softmax(logits, -1).unflatten(0, scores.shape) + scores[..., None]
        scores, index = scores.flatten(1).topk(candidates)
        parents, tokens = index // vocabulary, index % vocabulary
        extended = torch.cat([take(beams, parents), tokens[..., None]], -1)
        ends = torch.isin(tokens, eos) | (length == longest)

        worth = (scores / length**config.length_penalty).masked_fill(~ends, -torch.inf)
        ended = F.pad(extended[:, :count], (0, longest - length), value=config.padding)
        worths, index = torch.cat([worths, worth[:, :count]], 1).topk(count)
        results = take(torch.cat([results, ended], 1), index)
        sizes = take(F.pad(sizes, (0, count), value=length), index)

        held = beams.shape[1]
        scores, index = scores.masked_fill(ends, -torch.inf).topk(count)
        parents, beams = take(parents, index), take(extended, index)
        going = (~is_done(scores, worths, length, config)).nonzero().flatten()
        best[rows], lengths[rows] = results[:, 0], sizes[:, 0]
        if length == longest or not len(going):
            break
        parents = parents + held * torch.arange(len(rows), device=rows.device)[:, None]
        if len(going) < len(rows):
            rows, scores, beams, worths, results, sizes, parents = (
                t[going] for t in (rows, scores, beams, worths, results, sizes, parents)
            )
        decoding.reorder_(parents.flatten())
        logits = decoding.step(beams[..., -1].flatten())
    return best[:, : int(lengths.max())]


def take(t: Tensor, index: Tensor) -> Tensor:
    """Those of t [rows, n, ...] that `index` [rows, m] has."""
    return t.gather(1, index.view(*index.shape, *[1] * (t.ndim - 2)).expand(*index.shape, *t.shape[2:]))


def is_done(scores: Tensor, worths: Tensor, length: int, config: GenerationConfig) -> Tensor:
    """[rows] whether the beams of these log-probabilities [rows, beams] can do no better than the results."""
    worst = worths[:, -1]
    if config.early_stopping is True:
        return worst > -torch.inf
    if config.early_stopping == "never" and config.length_penalty > 0:
        length = config.max_new_tokens
    return (worst > -torch.inf) & (scores[:, 0] / length**config.length_penalty <= worst)
