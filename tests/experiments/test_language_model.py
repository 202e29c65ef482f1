"""Byte-level language models: corpora and windows, arms, scores, samples and claims."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxkit_experiments.experiment import Context, Results
from jaxkit_experiments.runner import run_experiment
from jaxkit_experiments.vq import language_model as lm
from jaxkit_experiments.vq.text import Windows, held_out, read_corpus, readable

TINY = lm.LanguageModelConfig(
    length=24,
    prompt=8,
    sample=8,
    block_length=4,
    codes=4,
    model_dim=8,
    key_dim=4,
    layers=1,
    batch_size=2,
    windows=4,
)


def test_a_corpus_splits_in_order_as_enwik8_does(tmp_path):
    file = tmp_path / "text8"
    file.write_bytes(bytes(byte % 251 for byte in range(1000)))
    corpus = read_corpus(file)
    assert [len(part) for part in corpus] == [900, 50, 50]
    np.testing.assert_array_equal(np.concatenate(corpus), np.arange(1000) % 251)
    # What does not divide by 20 goes to training.
    file.write_bytes(bytes(1019))
    assert [len(part) for part in read_corpus(file)] == [919, 50, 50]
    file.write_bytes(bytes(19))
    with pytest.raises(ValueError, match="at least 20 bytes"):
        read_corpus(file)
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        read_corpus(tmp_path / "enwik9")


def test_the_standard_library_is_the_default_corpus():
    corpus = read_corpus()
    assert len(corpus.train) > 5_000_000
    assert b"import" in corpus.test.tobytes()


def test_training_windows_are_found_again_and_cover_the_corpus():
    corpus = np.arange(60, dtype=np.uint8)
    source = Windows(corpus, 1, batch_size=4, length=5)
    batch = source[3]["bytes"]
    assert batch.shape == (4, 6)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, Windows(corpus, 1, 4, 5)[3]["bytes"])
    assert not np.array_equal(batch, source[4]["bytes"])
    assert not np.array_equal(batch, Windows(corpus, 2, 4, 5)[3]["bytes"])
    assert (np.diff(batch, axis=1) == 1).all()
    seen = {int(b) for step in range(200) for b in source[step]["bytes"].ravel()}
    assert seen == set(range(60))  # the first byte and the last included
    with pytest.raises(ValueError, match=r"at least length \+ 1 = 61"):
        Windows(corpus, 0, 1, 60)


def test_held_out_windows_do_not_overlap_and_are_spread():
    part = (np.arange(101) % 256).astype(np.uint8)
    every = held_out(part, 10, count=100, batch_size=5)
    assert every.shape == (2, 5, 11)
    np.testing.assert_array_equal(every[..., 1:].ravel(), np.arange(1, 101))  # each byte once
    some = held_out(part, 10, count=4, batch_size=2)
    assert some[..., 0].ravel().tolist() == [0, 20, 40, 60]
    with pytest.raises(ValueError, match="batch_size must be at most the 10 held-out windows"):
        held_out(part, 10, count=20, batch_size=11)


def test_bytes_are_readable_whatever_they_are():
    assert readable(np.frombuffer("é\tx\n".encode(), np.uint8)) == "é\tx\n"
    assert readable(np.array([0x1B, 0x5B, 0xC3], np.uint8)) == "\\x1b[\\xc3"  # no escape sequences
    shown = readable(np.arange(256).astype(np.uint8))
    assert all(char.isprintable() or char in "\n\t" for char in shown)


@pytest.mark.x32
def test_bits_per_byte_are_those_of_the_windows():
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 3, 25)), jnp.int32)
    model = lm.build_model(TINY, "vq", jax.random.key(0))
    metrics = jax.jit(lambda values: lm.evaluate(nnx.merge(graph, values), windows))
    graph, values = nnx.split(model)
    metrics = metrics(values)
    flat = windows.reshape(6, 25)
    logits = np.asarray(jax.jit(lambda v: nnx.merge(graph, v)(flat[:, :-1]))(values), np.float64)
    log_sum = np.log(np.exp(logits).sum(-1))
    score = np.take_along_axis(logits, np.asarray(flat)[:, 1:, None], -1)[..., 0]
    assert float(metrics["bits_per_byte"]) == pytest.approx(
        (log_sum - score).mean() / np.log(2), rel=1e-5
    )
    assert 1 <= float(metrics["codes"]) <= 4


@pytest.mark.x32
def test_the_stream_of_a_model_is_the_model():
    model = lm.build_model(dataclasses.replace(TINY, layers=2), "vq", jax.random.key(1))
    graph, values = nnx.split(model)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 24)), jnp.int32)
    both = jax.jit(
        lambda v: (nnx.merge(graph, v)(tokens), lm.decode_logits(nnx.merge(graph, v), tokens))
    )
    whole, stream = both(values)
    np.testing.assert_allclose(stream, whole, atol=2e-5 * float(jnp.abs(whole).max()))


@pytest.mark.x32
def test_arms_differ_in_what_a_query_sees():
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 256, (1, 24)), jnp.int32)
    rows = jnp.concatenate([tokens, tokens.at[0, 0].set((tokens[0, 0] + 1) % 256)])
    sees = {}
    for arm in ("vq", "full", "no-cache"):
        graph, values = nnx.split(lm.build_model(TINY, arm, jax.random.key(0)))
        logits = jax.jit(lambda v, graph=graph: nnx.merge(graph, v)(rows))(values)
        gap = np.abs(np.asarray(logits[0] - logits[1])).max(-1)
        sees[arm] = gap > 1e-6
    assert sees["vq"].all()
    assert sees["full"].all()
    assert sees["no-cache"].tolist() == [True] * 8 + [False] * 16  # blocks of 4
    assert lm.build_model(TINY, "vq-half", jax.random.key(0)).codebooks()[0].counts.shape == (1, 2)
    assert lm.build_model(TINY, "vq-double", jax.random.key(0)).codebooks()[0].counts.shape == (
        1,
        8,
    )


@pytest.mark.x32
def test_remat_changes_no_loss_and_no_gradient():
    batch = {"bytes": jnp.asarray(np.random.default_rng(3).integers(0, 256, (2, 25)), jnp.int32)}

    def run(config):
        model = lm.build_model(config, "vq", jax.random.key(0))
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        @jax.jit
        def gradient(params):
            def objective(params):
                model = nnx.merge(graph, params, rest, copy=True)
                value, _ = lm.loss(config, model, batch, jax.random.key(0))
                return value, model.codebooks()

            return jax.value_and_grad(objective, has_aux=True)(params)

        (value, codebooks), gradients = gradient(params)
        return value, codebooks, jax.tree.leaves(gradients)

    kept, again = run(TINY), run(dataclasses.replace(TINY, remat=True))
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    # Codes have moved: their counts were 1.
    assert float(jnp.sum(kept[1][0].counts)) == pytest.approx(0.99 * 4 + 0.01 * 2 * 24, rel=1e-5)


def test_the_rate_warms_up_and_falls_to_a_tenth():
    config = dataclasses.replace(TINY, steps=40, warmup=10, learning_rate=1.0, weight_decay=0.0)
    optimizer = lm.build_optimizer(dataclasses.replace(config, clip=1e9))
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(jnp.zeros(()))
        rates = []
        for _ in range(41):
            update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
            rates.append(-float(update))  # Adam's update of a constant gradient is the rate
    assert rates[0] == 0
    assert rates[10] == pytest.approx(1.0, rel=1e-3)
    assert rates[40] == pytest.approx(0.1, rel=1e-2)


def results_of(lengths=(), **arms):
    config = dataclasses.replace(TINY, lengths=lengths)
    named = {arm.replace("_", "-"): of for arm, of in arms.items()}
    return Results(config, named)


@pytest.mark.parametrize(
    ("arms", "claim", "status"),
    [
        ({"vq": 1.010, "no_cache": 1.026}, 0, "held"),
        ({"vq": 1.010, "no_cache": 1.015}, 0, "not held"),
        ({"vq": 1.010}, 0, "not testable"),
        ({"vq": 2.00, "full": 1.96}, 1, "held"),
        ({"vq": 2.00, "full": 1.94}, 1, "not held"),
        ({"vq": 8.00, "full": 8.00}, 1, "not testable"),
        ({"vq_half": 1.010, "vq": 1.005, "vq_double": 1.000}, 2, "held"),
        ({"vq_half": 1.000, "vq": 1.005, "vq_double": 1.000}, 2, "not held"),
    ],
)
def test_claims_on_bits(arms, claim, status):
    results = results_of(**{arm: {"bits_per_byte": [bits]} for arm, bits in arms.items()})
    assert lm.LanguageModel.claims[claim].judge(results).status == status


@pytest.mark.parametrize(("difference", "status"), [(1e-6, "held"), (1e-2, "not held")])
def test_claim_on_the_stream(difference, status):
    results = results_of(vq={"decode_difference": [1e-7, difference]})
    assert lm.LanguageModel.claims[3].judge(results).status == status
    assert lm.LanguageModel.claims[3].judge(results_of()).status == "not testable"


@pytest.mark.parametrize(
    ("ratio", "status"), [(3.1, "held"), (2.9, "not held"), (np.nan, "not testable")]
)
def test_claim_on_speed(ratio, status):
    speeds = {"vq": {"bytes_per_second_8192": [ratio]}, "full": {"bytes_per_second_8192": [1.0]}}
    assert lm.LanguageModel.claims[4].judge(results_of((8192,), **speeds)).status == status
    assert lm.LanguageModel.claims[4].judge(results_of((2048,), **speeds)).status == "not testable"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("vq-third",)}, "arms must be one of .*vq-half"),
        ({"prompt": 25}, "prompt must be at most length = 24"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"codes": 1}, "codes must be at least 2"),
        ({"clip": 0.0}, "clip must be greater than 0"),
    ],
)
def test_wrong_config_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_presets_fit_the_arms():
    for config in lm.LanguageModel.presets.values():
        assert set(config.arms) <= set(lm.ARMS)
        assert config.windows >= config.batch_size
    assert {"smoke", "cpu", "gpu"} <= set(lm.LanguageModel.presets)
    # Enwik8's 5 MB, each byte once.
    gpu = lm.LanguageModel.presets["gpu"]
    assert gpu.windows == 5_000_000 // gpu.length - 5_000_000 // gpu.length % gpu.batch_size


@pytest.mark.slow
@pytest.mark.x32
def test_smoke_run_shows_a_sample(tmp_path):
    file = tmp_path / "data.txt"
    file.write_bytes(b"for i in range(10): print(i)\n" * 400)
    config = dataclasses.replace(lm.LanguageModel.presets["smoke"], arms=("vq",), lengths=(32,))
    with jax.numpy_dtype_promotion("standard"):  # optax
        run_experiment(lm.LanguageModel(), config, tmp_path / "run", preset="smoke", data=file)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    metrics = summary["arms"]["vq"]
    assert metrics["perplexity"][0] == pytest.approx(2 ** metrics["bits_per_byte"][0])
    assert metrics["decode_difference"][0] < 1e-4
    assert metrics["bytes_per_second_32"][0] > 0
    kept = Context(tmp_path / "run").load_arrays("sample-vq")
    assert kept["samples"].shape == (1, config.sample)
    assert kept["samples"].min() >= 0
    assert kept["samples"].max() < 256
    assert readable(kept["prompt"]) + "┃" + readable(kept["samples"][0]) in summary["epilogue"]
    assert readable(kept["prompt"]) in file.read_text()
