"""Vocabularies, by the tokenizers library."""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from warpformer._C import InputError
from warpformer.training.ragged import Ragged

PAD, BOS, EOS, UNK, MASK = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
BATCH = 4096  # texts that are encoded at a time


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, sentinels: int = 0) -> Tokenizer:
    """Byte-pair encoding of bytes: what it encodes it decodes (in Unicode's normal form C).

    Args:
        texts: what pairs are counted in.
        vocab_size: tokens, special ones included; fewer where the texts do not have so many pairs.
        sentinels: how many `<extra_id_i>` there are, at the end and in T5's order: the last id is that of
            `<extra_id_0>`.

    Returns:
        A tokenizer in which `<pad>`, `<s>`, `</s>`, `<unk>` and `<mask>` have ids 0 to 4. It adds none of
        them; `.save("tokenizer.json")` is what transformers reads, too. `<mask>` and sentinels take the
        spaces before them, as tokens of words do.

    Raises:
        InputError: vocab_size has no room for the special tokens and the 256 bytes.

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units"; Radford et al.,
    "Language Models are Unsupervised Multitask Learners", 2.2 (of bytes); Raffel et al., "T5" (sentinels).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(SPECIAL_TOKENS) + len(alphabet) + sentinels
    if vocab_size < least:
        raise InputError(
            f"train_tokenizer: vocab_size = {vocab_size} is below {least}: special tokens, bytes"
        )
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - sentinels,
        special_tokens=[AddedToken(token, lstrip=token == MASK, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(sentinel(i), lstrip=True, special=True) for i in reversed(range(sentinels))]
    )
    return tokenizer


def sentinel(i: int) -> str:
    return f"<extra_id_{i}>"


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there.

    Raises:
        InputError: it is not.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise InputError(f"the tokenizer has no token {token!r}")
    return found


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Ragged:
    """Tokens of each text, without special ones."""
    batches = (texts[i : i + BATCH] for i in range(0, len(texts), BATCH))
    return Ragged.of(
        encoding.ids
        for batch in batches
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    )
