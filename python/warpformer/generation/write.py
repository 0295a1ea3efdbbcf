from collections.abc import Callable, Sequence

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
    drafts, columns_of_logits = rows[:, None][:, :0], [logits]
    while True:
        parts = read_off(decoding.history, columns_of_logits, drafts, rows, rules, choose, columns)
        index, history, ended = parts[0]
        if index is not None or ended is not None:
            history, index = going_on(parts, rows, lengths)
            if not len(index):
                return lengths
            if len(index) < len(rows):
                rows = rows[index]
                choose.keep_(index)
            else:
                index = None
        if drafter is None:
            columns_of_logits = [decoding.step(history, index)]
        else:
            drafts = allowed(drafter(history, index), history)
            columns_of_logits = decoding.verify(history, index, drafts).unbind(1)


# Numbers of rows, None for all; what they have; and which of them have ended, None for none.
Part = tuple[Tensor | None, History, Tensor | None]


def read_off(
    history: History,
    logits: Sequence[Tensor],
    drafts: Tensor,
    rows: Tensor,
    rules: Rules,
    choose: Callable[[Tensor, Tensor | None], Tensor],
    columns: Columns,
) -> list[Part]:
    """Chooses a token of each row, and another where it has that of its draft, and so on.

    Args:
        logits: 1 + k of [R, V]; drafts: [R, k].
        rows: [R], which rows of `columns` these are.
    """
    index, parts = None, []
    for i in range(len(logits)):
        scores = logits[i]
        tokens = choose(rules.scores(history, scores), index)
        log_probs = None
        if rules.config.return_dict_in_generate:
            log_probs = ops.log_softmax(scores.float(), -1).gather(1, tokens[:, None])[:, 0]
        history = history.append(tokens)
        ends = rules.ends(history) if rules.may_end(history) else None
        columns.put(rows, history, tokens, log_probs, ends)
        if i == len(logits) - 1:
            return [*parts, (index, history, ends)]
        if index is None:
            index = torch.arange(len(rows), device=rows.device)
        agrees = tokens == drafts[:, i]
        if ends is not None:
            agrees &= ~ends
        if not bool(agrees.all()):
            left = ~agrees
            parts.append((index[left], history.select(left), None if ends is None else ends[left]))
            if not bool(agrees.any()):
                break
            rows, index, history = rows[agrees], index[agrees], history.select(agrees)
            logits, drafts = [column[agrees] for column in logits], drafts[agrees]
    return parts


def going_on(parts: list[Part], rows: Tensor, lengths: Tensor) -> tuple[History, Tensor]:
    """The rows that have not ended, in their order, and their numbers; `lengths` get those of the others."""
    kept = []
    for index, history, ends in parts:
        index = torch.arange(len(rows), device=rows.device) if index is None else index
        if ends is not None and bool(ends.any()):
            lengths[rows[index[ends]]] = history.lengths[ends]
            going = ~ends
            index, history = index[going], history.select(going)
        kept.append((index, history))
    some = [(index, history) for index, history in kept if len(index)]
    if len(some) < 2:
        index, history = (some or kept)[0]
        return history, index
    index, order = torch.cat([index for index, _ in some]).sort()
    return History.joined([history for _, history in some], order), index
