from warpformer.bench import decode_step

TINY = decode_step.SIZES | dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)


def test_the_parts_are_those_of_the_step():
    model = decode_step.new_model(TINY)
    seconds = decode_step.measure(model, steps=4, rounds=1, **decode_step.OPTIONS["drawn"])
    named = {name for names in decode_step.PARTS.values() for name in names}
    assert {
        "linear",
        "rms_norm",
        "rope",
        "append_to_cache_",
        "cached_attention",
        "sample",
    } <= set(seconds)
    others = {"step", "scaled_dot_product_attention", "append_positions", "cached_attention_work"}
    assert set(seconds) - named <= others
    lines = decode_step.table(seconds).splitlines()
    assert lines[-1].endswith("| 100% |")
    assert len(lines) == 2 + len(decode_step.PARTS) + 3
