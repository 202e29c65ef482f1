"""The experiment on embeddings under sign optimizers: task, optimizers, closed forms, claims."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxkit_experiments.experiment import Results
from jaxkit_experiments.optim import embeddings
from jaxkit_experiments.optim.embeddings import BYTES, CARD, TRAINED, EmbeddingAnomaly
from jaxkit_experiments.speed.optim import state_bytes
from jaxkit_experiments.vq.text import Windows

from tests.experiments.smoke import smoke_run
from tests.settings import users_settings

CPU = EmbeddingAnomaly.presets["cpu"]
SHORT = dataclasses.replace(CPU, steps=40, warmup=8, rate=0.3, lion_rate=0.3)


# --- task --------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"a_1 (a_1) b\n" * 18 + b"a_1 b\tnew  \xc3" * 2)
    return path


def test_words_are_numbered_by_their_frequency(corpus):
    tokens = embeddings.read_tokens(5, corpus)
    # a_1: 38, b: 20, then ( and ) with 18 each in their order; "new" and \xc3 are too rare.
    assert tokens.words == (b"", b"a_1", b"b", b"(", b")")
    assert tokens.train[:10].tolist() == [1, 3, 1, 4, 2] * 2
    assert tokens.held_out[-4:].tolist() == [1, 2, 0, 0]
    assert (tokens.train.dtype, tokens.held_out.dtype) == (np.int32, np.int32)
    with pytest.raises(ValueError, match="vocabulary must be at most the 6 different words"):
        embeddings.read_tokens(7, corpus)


def test_occurrences_are_those_of_the_batches():
    config = dataclasses.replace(SHORT, vocabulary=7)
    source = Windows(np.arange(60, dtype=np.int32) % 5, 3, 4, 2)
    met, targets = embeddings._occurrences(config, source)
    seen = np.stack([source[step]["bytes"] for step in range(40)])
    assert met.tolist() == [int(np.sum(seen == token)) for token in range(7)]
    assert targets.tolist() == [int(np.sum(seen[..., 2] == token)) for token in range(7)]
    assert met[5:].tolist() == [0, 0]


@pytest.mark.x32
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_numpy(tied):
    config = dataclasses.replace(SHORT, vocabulary=9, dim=4, hidden=3)
    shapes = nnx.eval_shape(lambda: embeddings.NextToken(config, tied=tied, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(shapes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    windows = np.array([[1, 2, 3], [8, 0, 5]], np.int32)

    @jax.jit
    def outputs(params):
        model = nnx.merge(graphdef, params)
        logits = model(windows[:, :2])
        return logits, embeddings.mean_loss(model, windows), embeddings.largest(model)

    with users_settings():
        logits, loss, largest = outputs(params)
    table, hidden, bias, out = (
        np.asarray(leaf[...], np.float64)
        for leaf in (
            params.embed.embedding,
            params.hidden.kernel,
            params.hidden.bias,
            params.out.kernel,
        )
    )
    x = np.concatenate([table[[1, 8]], table[[2, 0]]], axis=1)
    expected = np.tanh(x @ hidden + bias[None]) @ out
    if tied:
        expected = expected @ np.roll(table, 2, axis=1).T
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    log_p = expected - np.log(np.exp(expected).sum(1, keepdims=True))
    assert float(loss) == pytest.approx(-(log_p[0, 3] + log_p[1, 5]) / 2, rel=1e-5)
    np.testing.assert_allclose(largest, np.abs(table).max(1), rtol=1e-6)


# --- optimizers and closed forms ---------------------------------------------------------------


def test_constant_signs_have_the_cards_closed_forms():
    rates = np.full(5000, 1e-3)
    path = embeddings.constant_sign(rates, 0.01, 0.02, relative=False)
    assert path[-1] == pytest.approx(4.8961059, rel=1e-7)
    assert path[-1] == pytest.approx(100 - (1 - 1e-5) ** 5000 * (100 - 0.02), rel=1e-10)
    path = embeddings.constant_sign(np.full(9000, 1e-3), 0.01, 0.02, relative=True)
    assert abs(int(np.argmax(path >= 50)) - 8521) <= 1


@pytest.mark.x32
@pytest.mark.parametrize("arm", ["plain", "lion"])
def test_a_row_of_constant_sign_goes_along_the_limit(arm):
    """The optimizers on a gradient that never changes; Lion's rate is absolute, Tiger's is not."""
    optimizer = embeddings.make_optimizer(SHORT, arm)
    params = {"embedding": jnp.full((1, 2), SHORT.init_scale)}
    grads = {"embedding": -jnp.ones((1, 2))}

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), params["embedding"][0, 0]

    with users_settings():
        start = params, optimizer.init(params)
        path = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 40)[1])(start)
    expected = embeddings.limit(SHORT, arm)
    assert len(expected) == 41
    np.testing.assert_allclose(path, expected[:-1], rtol=1e-4)
    assert expected[-1] > 50 * SHORT.init_scale


@pytest.mark.x32
def test_remedies_stop_a_token_that_is_no_longer_met():
    """Row 1 has a gradient once; the output layer goes on under every optimizer."""
    config = dataclasses.replace(CPU, warmup=1, steps=40)
    params = {"embedding": jnp.full((2, 2), 0.02), "kernel": jnp.ones((2, 2))}
    moved = {}
    for arm in TRAINED:
        optimizer = embeddings.make_optimizer(config, arm)

        def step(carry, number, optimizer=optimizer):
            params, state = carry
            row = jnp.array([[1.0], [0.0]]) + jnp.array([[0.0], [1.0]]) * (number == 1)
            grads = {"embedding": -row * jnp.ones((2, 2)), "kernel": jnp.ones((2, 2))}
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), params

        with users_settings():
            run = jax.jit(lambda carry, step=step: jax.lax.scan(step, carry, jnp.arange(40))[1])
            path = run((params, optimizer.init(params)))
        rows = np.asarray(path["embedding"][:, :, 0], np.float64)
        first, rest = rows[2, 1] - rows[1, 1], rows[-1, 1] - rows[2, 1]
        assert first > 0
        assert rows[-1, 0] > rows[2, 0]
        assert path["kernel"][-1, 0, 0] < path["kernel"][1, 0, 0]
        moved[arm] = rest / first
    for arm in ("lazy-param", "lazy-full", "lion-lazy"):
        assert moved[arm] == 0, arm
    for arm in ("plain", "tied", "lion"):
        assert moved[arm] > 15, arm  # 37 steps of a rate that falls to a tenth
    assert moved["hybrid"] < 10  # Adam's momentum of 0.9 dies out


@pytest.mark.x32
def test_micro_batches_are_compared_on_the_same_data():
    config = dataclasses.replace(SHORT, vocabulary=9, dim=2, hidden=2, seeds=(0, 1))
    windows = np.random.default_rng(0).integers(9, size=(1, 20, 8, 3), dtype=np.int32)
    windows = np.concatenate([windows, windows[:, ::-1]])
    with users_settings():
        weights = embeddings.first_weights(config)
        # The same weights for both seeds, whose batches come in another order.
        weights = jax.tree.map(lambda leaf: leaf[np.array([0, 0])], weights)
        with jax.enable_x64(True):
            whole, micro = (
                np.concatenate([np.reshape(leaf, (2, -1)) for leaf in jax.tree.leaves(after)], 1)
                for k in (1, 4)
                for after in [embeddings.weights_after(config, k, weights, windows)]
            )
    start = np.concatenate([np.reshape(leaf, (2, -1)) for leaf in jax.tree.leaves(weights)], 1)
    assert whole.dtype == np.float64
    np.testing.assert_allclose(micro, whole, rtol=0, atol=1e-12)
    for different in (start[0], whole[1]):
        assert np.abs(different - whole[0]).max() > 1e-2


@pytest.mark.x32
def test_hybrid_has_its_own_rate_for_the_embedding_and_no_decay():
    config = dataclasses.replace(CPU, warmup=1, steps=10, adam_rate=5e-3)
    optimizer = embeddings.make_optimizer(config, "hybrid")
    params = {"embedding": jnp.ones((1, 2)), "kernel": jnp.ones((1, 2))}
    with users_settings():
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(params, state, params)
    np.testing.assert_allclose(updates["embedding"], -5e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["kernel"], -1e-2 * (1 + 0.1), rtol=1e-5)


@pytest.mark.x32
def test_the_two_schedules_are_one():
    rates = [float(embeddings.schedule(CPU, 0.01)(n)) for n in (0, 100, 200, 1600, 3000, 9999)]
    np.testing.assert_allclose(rates, [0, 0.005, 0.01, 0.0055, 0.001, 0.001], rtol=1e-6)
    path = embeddings.limit(CPU, "lion")
    steps = np.diff(path) / (1 - CPU.weight_decay * path[:-1])
    np.testing.assert_allclose(steps[[0, 100, 200, 1600]], rates[:4], rtol=1e-6)


def test_state_bytes_count_the_leaves_of_a_state():
    params = {"w": jnp.zeros((64, 64), jnp.float32), "b": jnp.zeros(64, jnp.float32)}
    for name, optimizer in embeddings._optimizers(4).items():
        state = optimizer.init(params)
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        assert state_bytes(optimizer, params) == BYTES[name]
        assert total / 4160 == pytest.approx(BYTES[name], abs=0.01)  # but for a few scalars


# --- claims and configs ------------------------------------------------------------------------


def judge(arms, config=CPU):
    results = Results(
        config, {arm: {name: [value] for name, value in row.items()} for arm, row in arms.items()}
    )
    return [claim.judge(results).status for claim in EmbeddingAnomaly.claims]


def card():
    """The card's numbers; Lion's by the closed form."""
    arms = {
        arm: {name: sum(ends) / 2 for name, ends in of.items()} | {"never_targets": 1.0}
        for arm, of in CARD.items()
    }
    arms["lion"] = {"max_embedding": embeddings.limit(CPU, "lion")[-1], "loss": 4.5}
    arms["lion-lazy"] = {"max_embedding": 1.0, "loss": 4.4}
    arms["accumulation"] = {"difference": 1e-6, "apart": 0.0, "difference_x64": 1e-13}
    arms["accumulation"] |= {f"bytes[{name}]": value for name, value in BYTES.items()}
    return arms


def test_claims_on_the_cards_numbers():
    assert judge(card()) == ["held"] * 12


@pytest.mark.parametrize(
    ("index", "arm", "metric", "value"),
    [
        (0, "plain", "max_embedding", 9.8),
        (0, "plain", "share", 0.05),
        (1, "lazy-param", "max_embedding", 5.1),
        (1, "lazy-full", "loss", 4.34),
        (2, "hybrid", "loss", 4.34),
        (3, "tied", "never_targets", 0.8),
        (3, "tied", "max_embedding", 4.0),
        (4, "lion", "max_embedding", 7.0),
        (5, "lion-lazy", "max_embedding", 4.5),
        (5, "lion-lazy", "loss", 4.6),
        (6, "hybrid", "max_embedding", 0.7),
        (6, "tied", "max_embedding", 7.0),
        (7, "plain", "share", 0.3),
        (8, "lazy-full", "loss", 4.1),
        (9, "accumulation", "difference_x64", 2e-5),
        (10, "accumulation", "difference", 2e-5),
        (11, "accumulation", "bytes[tiger 4x]", 8.0),
    ],
)
def test_each_claim_turns_on_its_numbers(index, arm, metric, value):
    arms = card()
    arms[arm][metric] = value
    assert judge(arms)[index] == "not held"


def test_claims_are_not_testable_without_arms_or_training():
    assert set(judge({})) == {"not testable"}
    short = dataclasses.replace(CPU, steps=500)
    assert judge(card(), short) == ["not testable"] * 9 + ["held"] * 3
    gpu = EmbeddingAnomaly.presets["gpu"]
    assert embeddings.limit(gpu, "plain")[-1] * gpu.weight_decay > 0.9, "long enough"


def test_the_cpu_preset_is_the_cards():
    assert (CPU.dim, CPU.hidden, CPU.vocabulary, CPU.batch_size) == (32, 64, 4096, 256)
    assert (CPU.steps, CPU.rate, CPU.weight_decay, CPU.warmup) == (3000, 1e-2, 0.1, 200)
    assert CPU.arms == EmbeddingAnomaly.arms
    assert len(EmbeddingAnomaly.presets["gpu"].seeds) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("plane",)}, "arms must be one of .*Did you mean 'plain'"),
        ({"dim": 7}, "dim must be even"),
        ({"steps": 200}, "steps must be at least 201"),
        ({"micro_batches": 3}, "micro_batches must divide batch_size = 256"),
        ({"weight_decay": 0.0}, "weight_decay must be"),
        ({"seeds": ()}, "seeds must hold"),
    ],
)
def test_wrong_config_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CPU, **changes)


# --- a run -------------------------------------------------------------------------------------


@pytest.mark.x32
def test_a_run_from_end_to_end(tmp_path):
    config = dataclasses.replace(
        EmbeddingAnomaly.presets["smoke"],
        arms=("plain", "tied", "accumulation"),
        weight_decay=14.0,  # so that half of 1/λ is among the rows
    )
    ctx, config, arms = smoke_run(EmbeddingAnomaly(), tmp_path, config)
    results = Results(config, arms)
    assert results.mean("accumulation", "difference_x64") < 1e-12
    assert results.mean("accumulation", "difference") < 0.1

    kept = ctx.load_arrays("rows-plain")
    assert kept["rows"].shape == kept["met"].shape == (1, 64)
    assert kept["met"].sum() == 3 * 16 * 20
    assert results.mean("plain", "max_embedding") == pytest.approx(kept["rows"].max())
    far = kept["rows"] > 0.5 / 14
    assert 0 < far.mean() < 1
    assert results.mean("plain", "share") == pytest.approx(far.mean())
    source = Windows(embeddings.read_tokens(64, None).train, 0, 16, 2)
    targets = np.concatenate([source[step]["bytes"][:, 2] for step in range(20)])
    never = np.isin(np.flatnonzero(far[0]), targets, invert=True)
    assert results.mean("plain", "never_targets") == pytest.approx(never.mean())
    # The tied model is another one, from the same embedding.
    assert results.mean("plain", "loss") < math.log(64)
    assert results.mean("tied", "loss") != results.mean("plain", "loss")
    evaluated = [r["step"] for r in ctx.history("plain") if r["split"] == "evaluation"]
    assert evaluated == [10, 20]
    files = EmbeddingAnomaly().plot(results, ctx)
    assert [file.stem for file in files] == ["drift", "rows"]
    assert all(file.stat().st_size > 5000 for file in files)
    statuses = [claim.judge(results).status for claim in EmbeddingAnomaly.claims]
    assert statuses[:9] == ["not testable"] * 9
    assert statuses[9] == statuses[11] == "held"


def test_no_row_far_out_is_no_share():
    far = np.array([[True, True, False, True], [False] * 4])
    targets = np.array([[0, 3, 0, 1], [0, 0, 0, 0]])
    share, none = embeddings._never_targets(far, targets)
    assert share == pytest.approx(1 / 3)
    assert math.isnan(none)
