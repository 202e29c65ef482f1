"""EMA codebooks and revival: against NumPy, k-means, and one device against eight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from jaxkit.quantize import (
    LFQ,
    EMAState,
    batch_statistics,
    code_counts,
    code_entropies,
    codebook_loss,
    data_init,
    ema_codebook,
    ema_init,
    ema_update,
    kmeans,
    lfq_entropies,
    lookup,
    nearest_code,
    product_quantize,
    residual_quantize,
    revive,
    vector_quantize,
    vq_init,
)
from tests.tolerance import tol


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("implementation", ["auto", "scatter", "one_hot"])
def test_batch_statistics_are_sums_and_counts(implementation):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((6, 7, 3))
    index = rng.integers(0, 5, (6, 7))
    index[0, 0], index[1, 1], index[2, 2] = 5, -1, 100  # no codes
    z[0, 0] = np.nan
    mask = rng.random((6, 7)) > 0.3
    z[3, 3], mask[3, 3] = np.inf, False
    sums, counts = jax.jit(partial(batch_statistics, num_codes=5, implementation=implementation))(
        jnp.asarray(z), jnp.asarray(index), mask=jnp.asarray(mask)
    )
    assert counts.dtype == jnp.int32
    for code in range(5):
        chosen = mask & (index == code)
        np.testing.assert_allclose(sums[code], z[chosen].sum(0), atol=1e-13)
        assert int(counts[code]) == chosen.sum()


def test_statistics_are_float32_for_bfloat16_and_exact_in_the_counts():
    z = jnp.ones((70000, 1), jnp.bfloat16)
    sums, counts = batch_statistics(z, jnp.zeros(70000, jnp.int32), 2)
    assert sums.dtype == jnp.float32
    assert counts.tolist() == [70000, 0]
    assert float(sums[0, 0]) == 70000.0


def test_update_and_smoothing():
    codebook = random(4, 3)
    state = ema_init(codebook, count=2.0)
    sums, counts = random(4, 3, seed=1), jnp.array([3, 0, 1, 2])
    new = ema_update(state, sums, counts, decay=0.9)
    m = 0.9 * 2 * np.asarray(codebook) + 0.1 * np.asarray(sums)
    n = 0.9 * 2 + 0.1 * np.asarray(counts)
    np.testing.assert_allclose(new.sums, m, atol=1e-14)
    np.testing.assert_allclose(new.counts, n, atol=1e-14)
    eps = 1e-3
    smooth = (n + eps) / (n.sum() + 4 * eps) * n.sum()
    got = ema_codebook(new, smoothing="laplace", epsilon=eps)
    np.testing.assert_allclose(got, m / smooth[:, None], atol=1e-13)
    np.testing.assert_allclose(ema_codebook(new, smoothing="none"), m / n[:, None], atol=1e-13)
    clipped = ema_codebook(new, smoothing="clip", floor=1.9)
    np.testing.assert_allclose(clipped, m / np.maximum(n, 1.9)[:, None], atol=1e-13)


def test_laplace_smoothing_moves_unused_codes():
    """The card's 4 → 3.994 in one step at ε = 0.01, K = 3 (here γ = 0.9, four vectors)."""
    state = ema_init(jnp.array([[0.0], [4.0], [9.0]]))
    z = jnp.array([[0.1], [9.0], [8.9], [0.0]])
    sums, counts = batch_statistics(z, jnp.array([0, 2, 2, 0]), 3)
    new = ema_update(state, sums, counts, decay=0.9)
    assert f"{float(ema_codebook(new, epsilon=0.01)[1, 0]):.3f}" == "3.994"
    np.testing.assert_allclose(ema_codebook(new, smoothing="none")[1, 0], 4.0, atol=1e-14)


def test_codes_without_a_count_keep_their_value():
    state = EMAState(jnp.array([[0.0], [6.0], [1e-310]]), jnp.array([0.0, 2.0, 1e-310]))
    previous = jnp.array([[5.0], [5.0], [7.0]])
    got = ema_codebook(state, smoothing="none", previous=previous)
    assert got[:, 0].tolist() == [5.0, 3.0, 7.0]
    assert ema_codebook(state, smoothing="none")[:, 0].tolist() == [0.0, 3.0, 0.0]
    # Ten thousand batches without the second code: no underflow to 0/0.
    out = vq_init(jnp.array([[1.0, 1.0], [9.0, -9.0]], jnp.float32))
    quantize = partial(vector_quantize, update=True, decay=0.9, smoothing="none")
    run = lambda state, _: (quantize(state, jnp.ones((2, 2), jnp.float32)).state, None)
    out = jax.jit(lambda s: jax.lax.scan(run, s, length=2000)[0])(out)
    np.testing.assert_allclose(out.codebook, [[1, 1], [9, -9]], rtol=1e-5)


def test_check_6_without_memory_it_is_lloyds_algorithm():
    data = jnp.asarray(load_digits().data / 16)
    state, codebook = ema_init(data[:16]), data[:16]

    @jax.jit
    def step(state, codebook):
        sums, counts = batch_statistics(data, nearest_code(data, codebook), 16)
        state = ema_update(state, sums, counts, decay=0.0)
        return state, ema_codebook(state, smoothing="none", previous=codebook)

    def inertia(codebook):
        gap = data - lookup(codebook, nearest_code(data, codebook))
        return float(jnp.sum(gap**2))

    inertias = [inertia(codebook)]
    for _ in range(13):
        state, codebook = step(state, codebook)
        inertias.append(inertia(codebook))
    np.testing.assert_allclose(inertias[0], 7249.015625, rtol=1e-6)
    np.testing.assert_allclose(inertias[5], 4083.968912870, rtol=1e-6)
    np.testing.assert_allclose(inertias[13], 4046.978322550, rtol=1e-6)
    np.testing.assert_allclose(codebook, kmeans(None, data, 16, init=data[:16]).codebook)


def test_check_7_a_gradient_step_with_rate_half_over_n_lands_on_the_centroid():
    z, codebook = random(40, 3), random(5, 3, seed=1)
    index = nearest_code(z, codebook)
    sums, counts = batch_statistics(z, index, 5)
    total = lambda c: codebook_loss(z, lookup(c, index), reduction="sum") * z.shape[0]
    rate = 1 / (2 * jnp.maximum(counts, 1).astype(jnp.float64))
    stepped = codebook - rate[:, None] * jax.grad(total)(codebook)
    used = np.asarray(counts) > 0
    assert used.sum() >= 4
    means = np.asarray(sums)[used] / np.asarray(counts)[used, None]
    np.testing.assert_allclose(np.asarray(stepped)[used], means, atol=1e-13)
    np.testing.assert_array_equal(np.asarray(stepped)[~used], np.asarray(codebook)[~used])


def test_heads_by_vmap():
    z, codebooks = random(2, 30, 3), random(2, 5, 3, seed=1)

    def step(codebook, z):
        sums, counts = batch_statistics(z, nearest_code(z, codebook), 5)
        return ema_codebook(ema_update(ema_init(codebook), sums, counts))

    together = jax.vmap(step)(codebooks, z)
    for head in range(2):
        np.testing.assert_allclose(together[head], step(codebooks[head], z[head]), atol=1e-14)


def test_revival_replaces_codes_and_statistics():
    state = EMAState(random(6, 3), jnp.array([3.0, 0.1, 0.0, 2.0, 0.99, 1.0]))
    z = random(20, 3, seed=1).at[4].set(jnp.nan)
    mask = jnp.arange(20) % 2 == 0
    rows = np.asarray(z)[np.asarray(mask) & (np.arange(20) != 4)]
    new = jax.jit(partial(revive, threshold=1.0, reset_size=1.5))(
        jax.random.key(0), state, z, mask=mask
    )
    dead = [1, 2, 4]
    alive = [0, 3, 5]
    np.testing.assert_array_equal(new.counts, [3, 1.5, 1.5, 2, 1.5, 1])
    np.testing.assert_array_equal(new.sums[jnp.array(alive)], state.sums[jnp.array(alive)])
    codes = np.asarray(ema_codebook(new, smoothing="none"))[dead]
    found = [np.flatnonzero(np.abs(rows - code).max(1) < 1e-13) for code in codes]
    assert all(len(rows) == 1 for rows in found)
    assert len({int(rows[0]) for rows in found}) == 3  # without repetition
    assert float(revive(jax.random.key(0), state, z, threshold=1.0).counts[1]) == 1.0
    # Fewer rows than codes: with repetition. No row at all: nothing happens.
    few = revive(jax.random.key(0), state, z[:1], threshold=9.0)
    np.testing.assert_allclose(ema_codebook(few, smoothing="none"), np.tile(z[:1], (6, 1)))
    none = revive(jax.random.key(0), state, z, threshold=9.0, mask=jnp.zeros(20, bool))
    for got, expected in zip(none, state, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_revival_draws_every_row_alike():
    state = EMAState(jnp.zeros((1, 1)), jnp.zeros(1))
    z = jnp.arange(10.0)[:, None]
    draw = lambda key: revive(key, state, z, threshold=1.0).sums[0, 0]
    drawn = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 2000))
    counts = np.bincount(np.asarray(drawn, int), minlength=10)
    assert counts.min() > 140
    assert counts.max() < 260


MESHES = {
    "auto": lambda: Mesh(np.array(jax.devices()), ("data",)),
    "explicit": lambda: jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,)),
}


def everything(z, mask, axis_name=None):
    """All that is summed over a batch: on one device, on a mesh by jit, and inside shard_map."""
    codebook = random(12, 4, seed=5, dtype=z.dtype)
    common = {"mask": mask, "axis_name": axis_name}
    index = nearest_code(z, codebook, mask=mask)
    sums, counts = batch_statistics(z, index, 12, **common)
    state = ema_update(ema_init(codebook), sums, counts, decay=0.9)
    vq = vector_quantize(vq_init(codebook), z, update=True, decay=0.9, entropy_weight=1.0, **common)
    residual = residual_quantize(
        [vq_init(codebook), vq_init(codebook[:3])], z, update=True, codebook="loss", **common
    )
    parts = jax.vmap(vq_init)(random(2, 5, 2, seed=6, dtype=z.dtype))
    product = product_quantize(parts, z, update=True, codebook="loss", **common)
    return {
        "counts": counts,
        "histogram": code_counts(index, 12, axis_name=axis_name),
        "running counts": (state.counts, vq.state.ema.counts),
        "means": (sums, state.sums, ema_codebook(state), vq.state),
        "residual": residual.state,
        "product": product.state,
        "losses": (vq.losses, residual.losses, product.losses, LFQ(16)(z, **common)[1]),
        "kmeans": kmeans(None, z, 12, init=codebook, steps=5, **common).codebook,
        "entropies": (
            code_entropies(z, codebook, **common),
            lfq_entropies(z, **common),
        ),
    }


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("auto", jnp.float32),
        ("explicit", jnp.float32),
        ("shard_map", jnp.float32),
        ("shard_map", jnp.bfloat16),
    ],
)
def test_eight_devices_equal_one(kind, dtype):
    z = random(16, 9, 4, dtype=dtype)
    # From hardly any to nearly all of a device's vectors, so that a mean of means is no mean.
    mask = jnp.asarray(np.random.default_rng(1).random((16, 9)) < np.linspace(0.1, 1, 16)[:, None])
    one = jax.jit(everything)(z, mask)
    mesh = MESHES.get(kind, MESHES["auto"])()
    if kind == "shard_map":
        run = jax.shard_map(
            lambda z, mask: everything(z, mask, "data"),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
        )
        eight = jax.jit(run)(z, mask)
    else:
        spread = jax.device_put((z, mask), NamedSharding(mesh, P("data")))
        eight = jax.jit(everything)(*spread)
    for name in ("counts", "histogram", "running counts"):
        for got, expected in zip(
            jax.tree.leaves(eight[name]), jax.tree.leaves(one[name]), strict=True
        ):
            assert np.asarray(got).tobytes() == np.asarray(expected).tobytes()
    assert int(jnp.sum(one["counts"])) == int(jnp.sum(mask))
    for got, expected in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(
            got, expected, rtol=tol(jnp.float32, 144), atol=tol(jnp.float32, 144)
        )


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_devices_draw_the_same_rows(kind):
    z = random(64, 3).at[5].set(jnp.nan)
    mask = jnp.arange(64) % 3 > 0
    state = EMAState(random(7, 3, seed=1), jnp.arange(7.0))

    def run(z, mask, axis_name=None):
        common = {"mask": mask, "axis_name": axis_name}
        return (
            revive(jax.random.key(0), state, z, threshold=4.0, **common),
            data_init(jax.random.key(1), z, 7, **common),
            kmeans(jax.random.key(1), z, 7, **common).codebook,
        )

    mesh = MESHES.get(kind, MESHES["auto"])()
    if kind == "shard_map":
        mapped = jax.shard_map(
            lambda z, mask: run(z, mask, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
        )
        new, codes, centres = jax.jit(mapped)(z, mask)  # out_specs: known to be equal everywhere
    else:
        spread = jax.device_put((z, mask), NamedSharding(mesh, P("data")))
        draw = jax.jit(lambda z, mask: run(z, mask)[:2])
        new, codes = draw(*spread)
        for got, expected in zip(
            jax.tree.leaves((new, codes)), jax.tree.leaves(draw(z, mask)), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
        centres = codes
    rows = np.asarray(z)[np.asarray(mask) & (np.arange(64) != 5)]
    drawn = np.concatenate([np.asarray(new.sums / new.counts[:, None])[:4], np.asarray(codes)])
    for row in drawn:
        assert np.abs(rows - row).max(1).min() < 1e-13
    assert len(np.unique(np.asarray(codes).round(9), axis=0)) == 7
    np.testing.assert_array_equal(new.sums[4:], state.sums[4:])
    assert np.isfinite(centres).all()


def test_errors_name_the_argument():
    z, index, key = jnp.ones((4, 3)), jnp.zeros(4, int), jax.random.key(0)
    state = ema_init(jnp.ones((5, 3)))
    sums, counts = batch_statistics(z, index, 5)
    cases = [
        (lambda: batch_statistics(z, index[:3], 5), "index must have shape"),
        (lambda: batch_statistics(z, index, 0), "num_codes must be at least 1"),
        (lambda: batch_statistics(z, index, 5, mask=jnp.ones(3, bool)), "mask must have shape"),
        (lambda: batch_statistics(z, index, 5, implementation="x"), "implementation must be"),
        (lambda: ema_update(state, sums, counts, decay=1.0), r"decay must be in \[0, 1\)"),
        (lambda: ema_update(state, sums, counts, decay=-0.1), "decay must be at least 0"),
        (lambda: ema_update(state, sums[:2], counts), "sums must have the state's shape"),
        (lambda: ema_update(state, sums, counts[:2]), "counts must have the state's shape"),
        (lambda: ema_codebook(state, smoothing="laplas"), "Did you mean 'laplace'"),
        (lambda: ema_codebook(state, previous=jnp.ones((2, 3))), "previous must have"),
        (lambda: ema_codebook(state, smoothing="clip", floor=0.0), "floor must be greater"),
        (lambda: ema_init(jnp.ones((0, 3))), "at least one code"),
        (lambda: ema_init(jnp.ones((5, 3)), count=0.0), "count must be greater than 0"),
        (lambda: revive(key, state, z, threshold=0.0), "threshold must be greater than 0"),
        (lambda: revive(key, state, z, threshold=1.0, reset_size=0.0), "reset_size must be"),
        (lambda: revive(key, state, z[:, :2], threshold=1.0), "z must have 3 features"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="index must be an array of integers"):
        batch_statistics(z, jnp.zeros(4), 5)
    with pytest.raises(TypeError, match="mask must be a boolean"):
        batch_statistics(z, index, 5, mask=jnp.ones(4))
    with pytest.raises(TypeError, match="z must be an array of real"):
        batch_statistics(z.astype(int), index, 5)
