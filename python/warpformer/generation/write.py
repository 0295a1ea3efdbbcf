from collections.abc import Callable

import torch
from torch import Tensor

from warpformer import ops
from warpformer.generation.columns import Columns
from warpformer.generation.decoding import Decoding
from warpformer.generation.drafts import Drafter, allowed
from warpformer.generation.history import History
from warpformer.generation.rules import Rules


def write(
    decoding: Decoding,
    logits: Tensor,
    rules: Rules,
    choose: Callable[[Tensor, Tensor | None], Tensor],
    columns: Columns,
    drafter: Drafter | None = None,
) -> Tensor:
    """Puts new tokens into `columns`; returns the lengths of the rows, [R].

    With a drafter a call of the model gives the logits behind each token of a draft, too. Tokens are chosen
    from them as from any others, one after the other, as long as they are those of the draft. So what a
    call gives is what calls for single tokens would.

    Args:
        logits: [R, V] of the first new token.
        choose: a Greedy or a Sampler, which gives tokens [R] of scores [R, V].
    """
    rows = torch.arange(len(logits), device=logits.device)  # those that have not ended
    lengths = torch.empty_like(rows)
    drafts, logits = rows[:, None][:, :0], logits[:, None]
    while True:
        parts = read_off(decoding.history, logits, drafts, rows, rules, choose, columns)
        index, history, ended = parts[0]
        if index is not None or bool(ended.any()):
            parts = [(torch.arange(len(rows), device=rows.device) if i is None else i, *p) for i, *p in parts]
            for index, history, ended in parts:
                lengths[rows[index[ended]]] = history.lengths[ended]
            history, index = going_on(parts)
            if not len(index):
                return lengths
            if len(index) < len(rows):
                rows = rows[index]
                choose.keep_(index)
            else:
                index = None
        if drafter is None:
            logits = decoding.step(history, index)[:, None]
        else:
            drafts = allowed(drafter(history, index), history)
            logits = decoding.verify(history, index, drafts)


# Numbers of rows, None for all, what they have, and which of them have ended.
Part = tuple[Tensor | None, History, Tensor]


def read_off(
    history: History,
    logits: Tensor,
    drafts: Tensor,
    rows: Tensor,
    rules: Rules,
    choose: Callable[[Tensor, Tensor | None], Tensor],
    columns: Columns,
) -> list[Part]:
    """Chooses a token of each row, and another where it has that of its draft, and so on.

    Args:
        logits: [R, 1 + k, V]; drafts: [R, k].
        rows: [R], which rows of `columns` these are.
    """
    index, parts = None, []
    for i in range(logits.shape[1]):
        tokens = choose(rules.scores(history, logits[:, i]), index)
        log_probs = None
        if rules.config.return_dict_in_generate:
            log_probs = ops.log_softmax(logits[:, i].float(), -1).gather(1, tokens[:, None])[:, 0]
        place, history = history.new, history.append(tokens)
        ends = rules.ends(history)
        columns.put(rows, place, tokens, log_probs, ends)
        if i == logits.shape[1] - 1:
            return [*parts, (index, history, ends)]
        if index is None:
            index = torch.arange(len(rows), device=rows.device)
        agrees = (tokens == drafts[:, i]) & ~ends
        if not bool(agrees.all()):
            parts.append((index[~agrees], history.select(~agrees), ends[~agrees]))
            if not bool(agrees.any()):
                break
            rows, index, history = rows[agrees], index[agrees], history.select(agrees)
            logits, drafts = logits[agrees], drafts[agrees]
    return parts


def going_on(parts: list[Part]) -> tuple[History, Tensor]:
    """The rows that have not ended, in their order, and their numbers."""
    kept = [(index, history, (~ends).nonzero().flatten()) for index, history, ends in parts]
    kept = [
        (index, history) if len(going) == len(index) else (index[going], history.select(going))
        for index, history, going in kept
        if len(going)
    ]
    if len(kept) == 1:
        return kept[0][1], kept[0][0]
    if not kept:
        return parts[0][1], parts[0][0][:0]
    index = torch.cat([index for index, _ in kept])
    index, order = index.sort()
    return History.joined([history for _, history in kept], order), index
