import torch
from torch import Tensor

from warpformer import ops
from warpformer.generation.columns import Columns
from warpformer.generation.decoding import Decoding
from warpformer.generation.drafts import Drafter
from warpformer.generation.history import History
from warpformer.generation.rules import Rules
from warpformer.generation.sampling import Greedy, Sampler


def write(
    decoding: Decoding,
    logits: Tensor,
    rules: Rules,
    choose: Greedy | Sampler,
    columns: Columns,
    drafter: Drafter | None = None,
) -> Tensor:
    """Puts new tokens into `columns`; returns the lengths of the rows, [R].

    With a drafter a call of the model gives the logits behind each token of a draft, too. Tokens are chosen
    from them as from any others, as long as they are those of the draft. So what a
    call gives is what calls for single tokens would.

    Args:
        logits: [R, V] of the first new token.
    """
    rows = torch.arange(len(logits), device=logits.device)  # those that have not ended
    lengths = torch.empty_like(rows)
    drafts, logits = rows[:, None][:, :0], logits[:, None]
    while True:
        parts = read_off(decoding.history, logits, drafts, rows, rules, choose, columns)
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
            logits = decoding.step(history, index)
        else:
            choose.count_(history.new)
            drafts = drafter(history, index)
            logits = decoding.verify(history, index, drafts)


# Numbers of rows, None for all; what they have; and which of them have ended, None for none.
Part = tuple[Tensor | None, History, Tensor | None]


def read_off(
    history: History,
    logits: Tensor,
    drafts: Tensor,
    rows: Tensor,
    rules: Rules,
    choose: Greedy | Sampler,
    columns: Columns,
) -> list[Part]:
    """Chooses a token of each row, and another where it has that of its draft, and so on.

    Args:
        logits: [R, 1 + k, V]; drafts: [R, k or more].
        rows: [R], which rows of `columns` these are.
    """
    index, parts, last = None, [], logits.shape[1] - 1
    chosen = agreements = None
    if not rules.follow_the_text:  # all at once
        chosen = choose(logits)
        agreements = (chosen[:, :last] == drafts[:, :last]).T.tolist() if last else []
        chosen = chosen.unbind(1)
    logits, drafts = logits.unbind(1), drafts.unbind(1)
    for i in range(last + 1):
        if chosen is None:
            scores = rules.scores(history, of_rows(logits[i], index))
            tokens = choose(scores, rules.written(history), index)
        else:
            tokens = of_rows(chosen[i], index)
        log_probs = None
        if rules.config.return_dict_in_generate:
            scores = of_rows(logits[i], index).float()
            log_probs = ops.log_softmax(scores, -1).gather(1, tokens[:, None])[:, 0]
        history = history.append(tokens)
        ends = rules.ends(history) if rules.may_end(history) else None
        columns.put(of_rows(rows, index), history, tokens, log_probs, ends)
        if i == last:
            break
        if agreements is None:
            agrees = (tokens == of_rows(drafts[i], index)).tolist()
        else:
            agrees = agreements[i] if index is None else [agreements[i][row] for row in index.tolist()]
        if ends is not None:
            agrees = [agree and not end for agree, end in zip(agrees, ends.tolist(), strict=True)]
        if not any(agrees):
            break
        if not all(agrees):
            go_on = torch.tensor(agrees, device=rows.device)
            numbers, left = of_rows(torch.arange(len(rows), device=rows.device), index), ~go_on
            parts.append((numbers[left], history.select(left), None if ends is None else ends[left]))
            index, history = numbers[go_on], history.select(go_on)
    return [*parts, (index, history, ends)]


def of_rows(t: Tensor, index: Tensor | None) -> Tensor:
    return t if index is None else t[index]


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
