"""What rows have so far: histories that follow each other share memory, and none changes another."""

import torch

from warpformer.generation.history import PADDING, ROOM, History


def begun():
    ids, mask = torch.tensor([[7, 8, 9], [0, 5, 6]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    return ids, History.of_prompts(ids, mask, lambda lengths: lengths + 2 * ROOM)


def column(*values):
    return torch.tensor(values)


def test_what_follows_lies_in_the_same_memory():
    ids, history = begun()
    tokens, first_new = history.written
    assert tokens.tolist() == [[7, 8, 9] + [PADDING] * ROOM, [PADDING, 5, 6] + [PADDING] * ROOM]
    for i in range(2 * ROOM):
        history = history.append(column(i, -i))
        written = history.written
        if i < ROOM - 1:
            assert written[0].data_ptr() == tokens.data_ptr()
            assert written[1] is first_new
        rows = torch.stack([torch.arange(i + 1), -torch.arange(i + 1)])
        assert torch.equal(written[0][:, 3 : 4 + i], rows)
        assert (written[0][:, 4 + i :] == PADDING).all()
        assert torch.equal(history.tokens, written[0][:, : 4 + i])
        assert written[1].tolist() == [3, 3]
        assert history.lengths.tolist() == [4 + i, 3 + i]
    assert ids.tolist() == [[7, 8, 9], [0, 5, 6]]


def test_what_does_not_follow_lies_elsewhere():
    history = begun()[1]
    assert history.written[0].shape[1] == 3 + ROOM
    one, other = history.append(column(1, 2)), history.append(column(3, 4))
    further = other.append(column(5, 6))
    assert one.written[0][:, 3].tolist() == [1, 2]
    assert further.tokens[:, 3:].tolist() == [[3, 5], [4, 6]]
    assert other.written[0][:, 3:5].tolist() == [[3, PADDING], [4, PADDING]]
    assert history.written[0][:, 3].tolist() == [PADDING, PADDING]
    assert one.tokens[:, 3:].tolist() == [[1], [2]]
    assert one.select(column(1)).append(column(9)).tokens.tolist() == [[PADDING, 5, 6, 2, 9]]
