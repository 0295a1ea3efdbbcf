import pytest
from tokenizers import Tokenizer

from warpformer import InputError
from warpformer.training import train_tokenizer
from warpformer.training.tokenizer import encode, token_id


def test_special_tokens(tokenizer):
    names = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    assert [tokenizer.token_to_id(name) for name in names] == list(range(5))
    assert tokenizer.get_vocab_size() == 600
    assert [tokenizer.token_to_id(f"<extra_id_{i}>") for i in (0, 39)] == [599, 560]
    assert tokenizer.token_to_id("<extra_id_40>") is None


def test_whatever_is_encoded_is_decoded(tokenizer, pairs, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [*pairs.column(1)[:50], "日本 \U0001f600\n\t x  y", ""]
    tokens = encode(again, texts)
    assert [again.decode(tokens[i].tolist()) for i in range(len(tokens))] == texts
    assert not set(tokens.values.tolist()) & set(range(5))


def test_a_mask_is_a_word_with_its_space(tokenizer):
    ids = [tokenizer.token_to_id(token) for token in ("<mask>", "<extra_id_0>")]
    the, of = tokenizer.encode("the").ids, tokenizer.encode(" of").ids
    for token, id in zip(("<mask>", "<extra_id_0>"), ids, strict=True):
        assert tokenizer.encode(f"the {token} of").ids == [*the, id, *of]


def test_refusals(tokenizer):
    with pytest.raises(InputError, match="vocab_size = 260 is below 261"):
        train_tokenizer(["a"], 260)
    with pytest.raises(InputError, match="'<other>'"):
        token_id(tokenizer, "<other>")
