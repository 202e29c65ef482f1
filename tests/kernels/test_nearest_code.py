"""Nearest code: ties, cancellation, tokens without a code, the optional results, shardings."""

import re
import warnings
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxkit_kernels import _sharding, nearest_code
from jaxkit_kernels.nearest_code import NearestCodeTpuBlocks, NearestCodeXlaBlocks
from jaxkit_kernels.nearest_code.histogram import by_matmul, by_scatter
from jaxkit_kernels.nearest_code.scores import centre_and_bias

from tests.kernels import contract
from tests.kernels.cases import NEAREST_CODE, nearest_code_oracle

every_implementation = pytest.mark.parametrize(
    "implementation", ["reference", "xla", *contract.PALLAS]
)


def bind(implementation, **options):
    interpret = implementation in contract.PALLAS
    return partial(nearest_code, implementation=implementation, interpret=interpret, **options)


def gaussian(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def unfused(x, codebook):
    """As most code has it: the matrix, its expansion, argmin."""
    return jnp.argmin(jnp.sum(codebook**2, axis=1)[None] - 2 * (x @ codebook.T), axis=1)


@every_implementation
def test_lowest_index_on_ties(implementation):
    """Codes that occur several times, anywhere; and integers, where distinct codes tie."""
    function = jax.jit(bind(implementation, second=True))
    rng = np.random.default_rng(0)
    distinct = gaussian(1, 40, 5)
    which = rng.integers(0, 40, 300)
    codebook, x = distinct[which], gaussian(2, 150, 5)
    got = function(x, codebook)
    nearest = np.argmin(np.sum((x[:, None] - distinct[None]) ** 2, axis=-1, dtype=np.float64), 1)
    places = [np.flatnonzero(which == k) for k in range(40)]
    kept = np.array([k for k in range(150) if len(places[nearest[k]]) > 1])
    assert len(kept) > 100
    want = np.array([places[nearest[k]][:2] for k in kept])
    np.testing.assert_array_equal(np.stack([got.index, got.second], axis=1)[kept], want)

    x = rng.integers(-3, 4, (150, 5)).astype(np.float32)
    codebook = rng.integers(-3, 4, (300, 5)).astype(np.float32)
    want = nearest_code_oracle(x, codebook)
    ties = np.sum((x[:, None] - codebook[None]) ** 2, axis=-1) == want.distance[:, None]
    assert (ties.sum(1) > 1).mean() > 0.25
    for shift in (0, 1000):
        got = function(x + shift, codebook + shift)
        np.testing.assert_array_equal(got.index, want.index)
        np.testing.assert_array_equal(got.second, want.second)


@pytest.mark.x32
@every_implementation
def test_no_cancellation_far_from_the_origin(implementation):
    """The card's codebook: the expansion about 0 gets at least 43 of 64 codes wrong, we none."""
    line = (100 + 0.01 * np.arange(64)).astype(np.float32)
    codebook = np.repeat(line[:, None], 4, axis=1)
    assert np.sum(np.asarray(unfused(codebook, codebook)) != np.arange(64)) >= 43
    got = bind(implementation, distance=True)(codebook, codebook)
    np.testing.assert_array_equal(got.index, np.arange(64))
    np.testing.assert_array_equal(got.distance, 0)


@pytest.mark.x32
def test_float32_is_enough_where_tf32_is_not():
    """K = 1024, d = 64, Gaussian: products of TF32 numbers move 0.07 % of the codes, ours none."""
    codebook, x = gaussian(0, 1024, 64), gaussian(1, 20000, 64)

    def argmin(x, codebook):
        product = x.astype(np.float64) @ codebook.astype(np.float64).T
        return np.argmin(norms - 2 * product, axis=1)

    def tf32(value):  # ten bits of mantissa, to nearest
        bits = value.view(np.uint32)
        return ((bits + np.uint32(1 << 12)) & ~np.uint32((1 << 13) - 1)).view(np.float32)

    norms = np.sum(codebook.astype(np.float64) ** 2, axis=1)[None]
    want = argmin(x, codebook)
    flipped = np.mean(argmin(tf32(x), tf32(codebook)) != want)
    assert 0.0003 < flipped < 0.0014
    np.testing.assert_array_equal(nearest_code(x, codebook, implementation="xla").index, want)


def test_the_centre_is_near_the_mean_and_short():
    codebook = gaussian(0, 30, 3) + np.float32(1e4)
    centre, bias = jax.tree.map(np.asarray, centre_and_bias(jnp.asarray(codebook)))
    mean = np.mean(codebook, axis=0, dtype=np.float64)
    assert np.abs(centre - mean).max() <= np.abs(codebook - mean).max() / 8
    # The subtraction is exact: both are multiples of the codebook's last bit, 2^-10.
    exact = codebook.astype(np.float64) - centre.astype(np.float64)
    np.testing.assert_array_equal(codebook - centre, exact)
    np.testing.assert_allclose(bias, np.sum(exact**2, axis=1) / 2, rtol=1e-5)
    # One code, or one many times: the score of the token is finite and the index 0.
    for codes in (1, 5):
        same = jnp.full((codes, 3), 0.1, jnp.float32)
        assert nearest_code(same[:1], same).index == 0


@every_implementation
def test_tokens_without_a_code(implementation):
    """K, never 0; a look-up then shows it."""
    function = jax.jit(bind(implementation, distance=True, second=True, counts=True))
    codebook, x = gaussian(0, 6, 3), gaussian(1, 5, 3)
    x[1, 2], x[3, 0] = np.nan, np.inf
    got, clean = function(x, codebook), function(gaussian(1, 5, 3), codebook)
    bad = np.array([False, True, False, True, False])
    np.testing.assert_array_equal(got.index, np.where(bad, 6, clean.index))
    np.testing.assert_array_equal(got.second, np.where(bad, 6, clean.second))
    np.testing.assert_array_equal(got.distance, np.where(bad, np.nan, clean.distance))
    assert got.counts.sum() == 3
    assert np.isnan(jnp.take(jnp.asarray(codebook), got.index, axis=0)[1]).all()
    for value in (np.nan, np.inf):
        broken = codebook.copy()
        broken[4, 1] = value
        np.testing.assert_array_equal(function(x, broken).index, 6)


@every_implementation
def test_mask(implementation):
    codebook, x = gaussian(0, 6, 3), gaussian(1, 40, 3)
    mask = np.random.default_rng(2).random(40) < 0.6
    x[~mask] = np.nan
    options = {"distance": True, "second": True, "counts": True}
    got = jax.jit(lambda x, c, m: bind(implementation, **options)(x, c, mask=m))(x, codebook, mask)
    want = nearest_code_oracle(x[mask], codebook)
    for name in ("index", "second"):
        np.testing.assert_array_equal(getattr(got, name)[mask], getattr(want, name))
        np.testing.assert_array_equal(getattr(got, name)[~mask], 6)
    np.testing.assert_allclose(got.distance[mask], want.distance, rtol=1e-5)
    np.testing.assert_array_equal(got.distance[~mask], 0)
    np.testing.assert_array_equal(got.counts, want.counts)


@every_implementation
def test_one_code_has_no_second(implementation):
    got = bind(implementation, second=True)(gaussian(0, 3, 2), gaussian(1, 1, 2))
    np.testing.assert_array_equal(got.index, 0)
    np.testing.assert_array_equal(got.second, 1)
    assert got.distance is None
    assert got.counts is None


@every_implementation
def test_no_tokens(implementation):
    function = bind(implementation, distance=True, second=True, counts=True)
    x, codebook = jnp.zeros((0, 3), jnp.float32), jnp.ones((4, 3), jnp.float32)
    if implementation in contract.PALLAS:
        with pytest.raises(NotImplementedError, match=r"at least one token.*got \(0, 3\)"):
            function(x, codebook)
        return
    got = function(x, codebook)
    assert got.index.shape == got.second.shape == got.distance.shape == (0,)
    np.testing.assert_array_equal(got.counts, 0)


@every_implementation
def test_nothing_to_differentiate(implementation):
    """Zero gradients, in both modes and under vmap and jit, rather than an error."""
    function = bind(implementation, distance=True, second=True, counts=True)

    def loss(x, codebook):
        found = function(x, codebook)
        return jnp.sum(found.distance) + jnp.sum(x) * found.index[0].astype(x.dtype)

    x, codebook = jnp.asarray(gaussian(0, 2, 7, 3)), jnp.asarray(gaussian(1, 2, 5, 3))
    bars = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(x, codebook)
    first = [nearest_code_oracle(*pair).index[0] for pair in zip(x, codebook, strict=True)]
    np.testing.assert_array_equal(bars[0], np.broadcast_to(np.reshape(first, (2, 1, 1)), x.shape))
    np.testing.assert_array_equal(bars[1], 0)
    only = lambda x: function(x, codebook[0]).distance
    _, tangent = jax.jit(lambda x: jax.jvp(only, (x,), (x,)))(x[0])
    np.testing.assert_array_equal(tangent, 0)


def test_distance_is_summed_afresh():
    """Relative accuracy where the expansion has none: 1e-6 of a distance of 1e-8 of the norms."""
    rng = np.random.default_rng(0)
    codebook = jnp.asarray(rng.standard_normal((100, 16)) + 10, jnp.float32)
    x = codebook[::2] + jnp.asarray(1e-3 * rng.standard_normal((50, 16)), jnp.float32)
    search = jax.jit(partial(nearest_code, distance=True))
    got, want = search(x, codebook), nearest_code_oracle(x, codebook)
    np.testing.assert_array_equal(got.index, 2 * np.arange(50))
    np.testing.assert_allclose(got.distance, want.distance, rtol=2e-6)
    np.testing.assert_array_equal(search(codebook, codebook).distance, 0)


def test_dtypes():
    x, codebook = jnp.asarray(gaussian(0, 9, 4)), jnp.asarray(gaussian(1, 5, 4))
    search = jax.jit(partial(nearest_code, distance=True))
    wide = search(x, codebook)
    for narrow in (jnp.bfloat16, jnp.float16):
        low = x.astype(narrow)
        got = search(low, codebook)  # the codebook keeps its digits
        want = search(low.astype(jnp.float32), codebook)
        assert got.distance.dtype == narrow
        np.testing.assert_array_equal(got.index, want.index)
        np.testing.assert_array_equal(got.distance, want.distance.astype(narrow))
    got = search(x, codebook.astype(jnp.float64))
    assert (got.index.dtype, got.distance.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_allclose(got.distance, wide.distance, rtol=1e-6)


@pytest.mark.parametrize(("tokens", "codes"), [(1, 1), (300, 127), (300, 128), (1000, 700)])
def test_histogram(tokens, codes):
    index = np.random.default_rng(0).integers(0, codes + 1, tokens).astype(np.int32)
    want = np.bincount(index, minlength=codes + 1)[:codes]
    for form in (by_scatter, by_matmul):
        got = form(jnp.asarray(index), num_codes=codes)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)


# No shrinking: every shape is a compilation.
@hypothesis.settings(
    max_examples=8, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate]
)
@hypothesis.given(
    tokens=st.integers(1, 9),
    codes=st.integers(1, 20),
    features=st.integers(1, 4),
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_blocks(tokens, codes, features, rows, columns, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (tokens, features)).astype(np.float32)
    codebook = rng.integers(-2, 3, (codes, features)).astype(np.float32)
    options = {"implementation": "xla", "distance": True, "second": True, "counts": True}
    sizes = NearestCodeXlaBlocks(tokens=rows, codes=columns)
    got = jax.jit(partial(nearest_code, block_sizes=sizes, **options))(x, codebook)
    jax.tree.map(np.testing.assert_array_equal, got, nearest_code_oracle(x, codebook))


# 8192 tokens over eight devices.
def sharded(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    x, codebook = NEAREST_CODE.operands((600, 50, 8), jnp.float32)
    x = jnp.tile(x, (14, 1))[:8192]
    place = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    return mesh, (x, codebook), (place(x, P("data")), place(codebook, P()))


def test_tokens_over_devices():
    """Every device searches for its own tokens; only the counts are added up."""
    _, plain, placed = sharded(AxisType.Auto)
    function = jax.jit(NEAREST_CODE.function)
    got = function(*placed)
    jax.tree.map(np.testing.assert_array_equal, got, function(*plain))
    assert got.index.sharding.spec == P("data")
    text = function.lower(*placed).compile().as_text()
    moved = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute|all-reduce)\(", text)
    assert all(re.match(r"(s32\[50\]|pred\[\])", kind) for kind in moved), moved


def test_explicit_shardings():
    _, plain, placed = sharded(AxisType.Explicit)
    function = jax.jit(NEAREST_CODE.function)
    got = function(*placed)
    jax.tree.map(np.testing.assert_array_equal, got, function(*plain))
    assert got.index.sharding.spec == P("data")
    with pytest.raises(NotImplementedError, match=r"no explicitly sharded array .*shard_map"):
        nearest_code(*placed, implementation="pallas_tpu", interpret=True)


def test_shard_map():
    """With the counts added up by hand; the kernels are then lowered for one device each."""
    mesh, plain, placed = sharded(AxisType.Auto)

    def local(x, codebook, implementation="auto"):
        found = NEAREST_CODE.function(x, codebook, implementation=implementation)
        return found._replace(counts=jax.lax.psum(found.counts, "data"))

    def over_devices(function):
        specs = nearest_code_oracle(np.ones((1, 1)), np.ones((1, 1)))
        out = type(specs)(P("data"), P("data"), P("data"), P())
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(P("data"), P()), out_specs=out))

    got = over_devices(local)(*placed)
    jax.tree.map(np.testing.assert_array_equal, got, jax.jit(NEAREST_CODE.function)(*plain))
    spec = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in plain]
    for implementation, platform in (("pallas_tpu", "tpu"), ("pallas_gpu", "cuda")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            traced = over_devices(partial(local, implementation=implementation)).trace(*spec)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("tpu_custom_call" if platform == "tpu" else "mosaic_gpu") in text


def test_types_under_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def local(x, codebook):
        kind = _sharding.result((1,), jnp.float32, codebook, x).manual_axis_type
        assert kind.varying == {"data"}
        assert not jax.typeof(codebook).manual_axis_type.varying
        assert jax.typeof(_sharding.vary(codebook, x)).manual_axis_type.varying == {"data"}
        return x

    both = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    jax.eval_shape(both, jnp.ones(8), jnp.ones(8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.ones((4, 2))}, ValueError, r"x must have the codebook's 3 features; got .*4, 2"),
        ({"x": jnp.ones(4)}, ValueError, r"x must be \[tokens, features\]; got shape \(4,\)"),
        ({"x": jnp.ones((4, 3), complex)}, TypeError, r"x must be a real floating.*got complex128"),
        ({"codebook": jnp.ones((0, 3))}, ValueError, r"at least one code .*got shape \(0, 3\)"),
        ({"codebook": jnp.ones(3)}, ValueError, r"codebook must be \[codes, features\]; got"),
        ({"codebook": jnp.ones((2, 3), int)}, TypeError, r"codebook must be a real .*got int64"),
        ({"mask": jnp.ones(3, bool)}, ValueError, r"mask must have shape \(4,\).*got \(3,\)"),
        ({"mask": jnp.ones(4)}, TypeError, r"mask must be boolean; got float64"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": jnp.ones((4, 3)), "codebook": jnp.ones((2, 3)), **change}
    with pytest.raises(error, match=message):
        nearest_code(arguments.pop("x"), arguments.pop("codebook"), **arguments)


def test_block_sizes_of_another_implementation_are_passed_over():
    x, codebook = gaussian(0, 9, 4), gaussian(1, 5, 4)
    got = nearest_code(x, codebook, block_sizes=NearestCodeTpuBlocks(tokens=128, codes=256))
    np.testing.assert_array_equal(got.index, nearest_code(x, codebook).index)
    with pytest.raises(ValueError, match=r"tokens must be a multiple of 128; got 64"):
        NearestCodeTpuBlocks(tokens=64, codes=128)
