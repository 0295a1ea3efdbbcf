import copy

import pytest
import torch

import warpformer as wf

BATCH, TOKENS = 8, 128


def bert_base():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    with torch.inference_mode(False):
        return BertModel(BertConfig(), add_pooling_layer=False).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_patch_(compare, dtype):
    """BERT-base of transformers as it is (sdpa), and patched, on a padded batch of lengths T / 2 to T."""
    theirs = bert_base().to(dtype)
    ours = copy.deepcopy(theirs)
    wf.patch_(ours)
    lengths = torch.linspace(TOKENS // 2, TOKENS, BATCH).long()
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()

    def hidden(model):
        return lambda ids: model(ids, attention_mask=mask).last_hidden_state * mask[..., None]

    config, weights = theirs.config, sum(p.numel() for p in theirs.encoder.parameters())
    scores = 4 * BATCH * TOKENS**2 * config.hidden_size * config.num_hidden_layers
    compare(
        f"BERT-base, {BATCH}x{TOKENS}",
        dtype=dtype,
        inputs=lambda: (torch.randint(config.vocab_size, (BATCH, TOKENS)),),
        ours=hidden(ours),
        peers={"transformers": hidden(theirs)},
        moved=weights * dtype.itemsize,
        flops=2 * BATCH * TOKENS * weights + scores,
    )
