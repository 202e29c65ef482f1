"""Types of a policy, constants that survive float16, and reports of what a type loses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.optim.loss_scaling import scaled_value_and_grad
from jaxkit.optim.precision import (
    PRESETS,
    Policy,
    layer_norm,
    mask_value,
    masked_softmax,
    precision_report,
    rms_norm,
    safe_eps,
)


def test_constants_of_float16():
    """Card, check 1."""
    half = lambda value: float(jnp.asarray(value, jnp.float64).astype(jnp.float16))
    assert half(65519.99) == 65504.0
    assert half(65520.0) == np.inf
    assert float(jnp.finfo(jnp.float16).tiny) == 2.0**-14
    assert half(2.0**-24) == 2.0**-24
    assert half(2.0**-25) == 0.0
    assert half(2049.0) == 2048.0
    assert half(1e-8) == half(1e-12) == 0.0
    assert half(1e-7) == 2.0**-23
    assert half(-1e9) == -np.inf
    assert half(1e-4) > 0
    assert half(half(1e-4) ** 2) == 0.0
    assert float(jnp.finfo(jnp.float16).eps) == 2.0**-10
    assert float(jnp.finfo(jnp.bfloat16).eps) == 2.0**-7
    assert half(-65504.0 - 15) == -65504.0
    assert half(-65504.0 - 16) == -np.inf
    assert half(-1e12) == half(-65504.0 * 2) == -np.inf
    assert half(255.9**2) < np.inf
    assert half(256.0**2) == np.inf
    # Float32 code in float16: a constant row has no norm, and hides what it should show.
    with np.errstate(all="ignore"):
        for eps, normed in ((1e-12, np.nan), (1e-4, 0.0)):
            centred, eps = np.zeros(3, np.float16), np.float16(eps)
            np.testing.assert_array_equal(centred / np.sqrt(np.mean(centred**2) + eps), normed)
        scores, mask = np.ones(2, np.float16), np.asarray([1, 0], np.float16)
        np.testing.assert_array_equal(scores - (1 - mask) * np.float16(1e12), [np.nan, -np.inf])


def test_safe_constants_where_the_usual_ones_fail():
    """Card: 1 / (n + ε), log(p + ε) and the slope of √(v + ε) at zero."""
    eps = jnp.asarray(safe_eps(jnp.float16, 1e-12), jnp.float16)
    zero = jnp.zeros((), jnp.float16)
    assert float(1 / (zero + eps)) < 65504
    for function in (jnp.log, jnp.sqrt):
        value, slope = jax.value_and_grad(lambda x, f=function: f(x + eps))(zero)
        assert np.isfinite([float(value), float(slope)]).all()


def test_safe_eps_and_mask_value_survive_their_type():
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        for eps in (1e-45, 1e-12, 1e-8, 1e-3):
            held = np.asarray(jnp.asarray(safe_eps(dtype, eps), dtype), np.float64)
            with np.errstate(all="ignore"):
                assert held > 0
                assert np.isfinite(np.asarray(1 / jnp.asarray(held, dtype), np.float64))
        lowest = jnp.asarray(mask_value(dtype), dtype)
        assert np.isfinite(np.asarray(lowest, np.float64))
        assert float(jnp.nextafter(lowest, jnp.asarray(-jnp.inf, dtype))) == -np.inf
    assert safe_eps(jnp.float16, 1e-3) == 1e-3
    assert safe_eps(jnp.float32, 1e-8) == 1e-8
    with pytest.raises(ValueError, match="eps must be"):
        safe_eps(jnp.float16, 0.0)
    with pytest.raises(TypeError, match="dtype must be a floating"):
        mask_value(jnp.int32)


def test_policy_casts_floating_arrays_alone():
    policy = Policy.parse("params=float32,compute=float16,output=bfloat16")
    tree = {
        "w": jnp.ones(2, jnp.float32),
        "n": np.ones(2, np.float64),
        "i": jnp.arange(2),
        "b": jnp.asarray(True),
        "c": jnp.ones(1, jnp.complex64),
        "key": jax.random.key(0),
        "none": None,
        "shape": jax.ShapeDtypeStruct((3,), jnp.float32),
        "scalar": np.float32(0.5),
        "float0": np.zeros(2, jax.dtypes.float0),
        "number": 0.5,
    }
    cast = policy.cast_to_compute(tree)
    for name in ("w", "n", "shape", "scalar"):
        assert cast[name].dtype == jnp.float16
    for name in ("i", "b", "c", "key", "none", "float0", "number"):
        assert cast[name] is tree[name]
    assert policy.cast_to_compute({}) == {}
    assert policy.cast_to_compute(None) is None
    assert policy.cast_to_param(cast)["w"].dtype == jnp.float32
    assert policy.cast_to_output(cast)["w"].dtype == jnp.bfloat16
    assert policy.cast_to_accum(cast)["w"].dtype == jnp.float32


def test_policy_defaults_presets_and_overrides():
    assert Policy(jnp.bfloat16) == Policy(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16)
    assert Policy(compute_dtype=jnp.float16).output_dtype == jnp.float16
    for name in PRESETS:
        if name == "float16":
            with pytest.warns(UserWarning, match="sign optimizers"):
                policy = Policy.parse(name)
        else:
            policy = Policy.parse(name)
        assert Policy.parse(str(policy)) == policy
        assert hash(Policy.parse(str(policy))) == hash(policy)
    assert Policy.parse("params=f32, compute=bf16").compute_dtype == jnp.bfloat16
    policy = Policy(jnp.bfloat16, path_overrides={r"norm/scale$": jnp.float32})
    tree = {"norm": {"scale": jnp.ones(1), "bias": jnp.ones(1)}}
    for cast in (policy.cast_to_param, policy.cast_to_compute):
        out = cast(tree)["norm"]
        assert (out["scale"].dtype, out["bias"].dtype) == (jnp.float32, jnp.bfloat16)


def test_a_path_begins_inside_of_an_argument():
    policy = Policy(compute_dtype=jnp.float16, path_overrides={"^norm$": jnp.float32})
    tree = {"norm": jnp.ones(1, jnp.float32), "prenorm": jnp.ones(1, jnp.float32)}
    dtypes = policy.wrap(
        lambda *args, **kwargs: jax.tree.map(lambda x: str(x.dtype), (args, kwargs))
    )
    seen = {"norm": "float32", "prenorm": "float16"}
    assert dtypes(tree, tree, third=tree) == ((seen, seen), {"third": seen})

    def loss(params, batch):
        assert [x["norm"].dtype for x in (params, batch)] == [jnp.float32] * 2
        assert [x["prenorm"].dtype for x in (params, batch)] == [jnp.float16] * 2
        return jnp.sum(params["norm"])

    scaled_value_and_grad(loss, policy=policy)(1.0, tree, tree)


def test_casts_keep_a_sharding_and_work_under_jit_and_vmap():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(np.arange(8, dtype=np.float32), layout)
    policy = Policy.parse("bfloat16-mixed")
    for cast in (policy.cast_to_compute, jax.jit(policy.cast_to_compute)):
        assert cast({"w": x})["w"].sharding.is_equivalent_to(layout, 1)
    assert jax.vmap(policy.cast_to_compute)(x).dtype == jnp.bfloat16
    assert policy.cast_to_compute({"w": x})["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params=float32,comput=float16", "'comput'"),
        ("mixed", "policy must be one of 'float32'"),
        ("params=float23", "params of the policy .* got 'float23'"),
        ("params=float32,params=float16", "must name params once"),
    ],
)
def test_policy_errors_name_the_key(text, message):
    with pytest.raises(ValueError, match=message):
        Policy.parse(text)


def test_policy_refuses_types_without_fractions():
    with pytest.raises(TypeError, match="param_dtype must be a floating-point type; got int32"):
        Policy(jnp.int32)
    with pytest.raises(TypeError, match=r"path_overrides\['w'\]"):
        Policy(path_overrides={"w": jnp.int8})


def test_gradients_come_in_the_parameters_type():
    policy = Policy.parse("float16-mixed")
    wrapped = policy.wrap(lambda w, x: jnp.tanh(x @ w))
    weights, x = jnp.ones((2, 3), jnp.float32), jnp.ones((4, 2), jnp.float32)
    assert wrapped(weights, x).dtype == jnp.float32
    assert jax.grad(lambda w: wrapped(w, x).sum())(weights).dtype == jnp.float32
    text = str(jax.make_jaxpr(wrapped)(weights, x))
    assert "f16[4,3] = dot_general" in text


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_masked_softmax_against_float64(dtype):
    """Card, check 7: a softmax over the kept entries; a row without any is zeros."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 33)) * 6, dtype)
    mask = rng.random((5, 33)) < 0.6
    mask[3] = False
    got = masked_softmax(x, jnp.asarray(mask))
    assert got.dtype == dtype
    for row, keep, probabilities in zip(
        np.asarray(x, np.float64), mask, np.asarray(got, np.float64), strict=True
    ):
        assert not probabilities[~keep].any()
        if keep.any():
            scores = np.exp(row[keep] - row[keep].max())
            expected = scores / scores.sum()
            ulps = 2 * max(2.0**-23 if dtype != jnp.float64 else 2.0**-52, 0)
            room = ulps if dtype in (jnp.float32, jnp.float64) else float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(probabilities[keep], expected, rtol=0, atol=room)
    gradient = jax.grad(lambda x: masked_softmax(x, jnp.asarray(mask))[:, ::3].sum())(x)
    assert np.isfinite(np.asarray(gradient, np.float64)).all()
    assert not np.asarray(gradient)[3].any()


def test_masked_softmax_options_and_errors():
    x, none = jnp.full((2, 4), -65504.0, jnp.float16), jnp.zeros((2, 4), bool)
    uniform = masked_softmax(x, none, fully_masked="uniform")
    np.testing.assert_array_equal(np.asarray(uniform, np.float32), 0.25)
    np.testing.assert_array_equal(masked_softmax(x, ~none), 0.25)
    # The sum of the exponentials is beyond float16.
    many = masked_softmax(jnp.zeros(70_000, jnp.float16), jnp.ones(70_000, bool))
    np.testing.assert_allclose(np.asarray(many, np.float64), 1 / 70_000, atol=2.0**-25, rtol=0)
    # A score of -inf is no score, be it all that the mask keeps.
    hidden = jnp.asarray([[-jnp.inf, -jnp.inf, 1, 1], [-jnp.inf, 1, 1, -jnp.inf]], jnp.float16)
    keep = jnp.asarray([[True, True, False, False], [True, True, True, True]])
    np.testing.assert_array_equal(masked_softmax(hidden, keep), [[0] * 4, [0, 0.5, 0.5, 0]])
    slope = jax.grad(lambda x: masked_softmax(x, keep)[:, 1].sum())(hidden)
    np.testing.assert_array_equal(slope, [[0] * 4, [0, 0.25, -0.25, 0]])
    assert np.isnan(masked_softmax(hidden.at[0, 1].set(jnp.nan), keep)[0, 1])
    columns = masked_softmax(x, jnp.asarray([[True], [False]]), axis=0)
    np.testing.assert_array_equal(columns, [[1] * 4, [0] * 4])
    with pytest.raises(TypeError, match="mask must be boolean"):
        masked_softmax(x, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="mask must have the 2 axes of x"):
        masked_softmax(x, jnp.ones((3, 4), bool))
    with pytest.raises(ValueError, match="fully_masked must be one of"):
        masked_softmax(x, none, fully_masked="nan")


def test_norms_in_float16_do_not_overflow_or_vanish():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 64)) * 400
    scale, bias = rng.normal(size=(2, 64))
    half = jnp.asarray(x, jnp.float16)
    exact = np.asarray(half, np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias
    got = layer_norm(half, jnp.asarray(scale), jnp.asarray(bias))
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(got, np.float64), normed, rtol=2e-3, atol=2e-3)
    root = np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    got = rms_norm(half, jnp.asarray(scale))
    np.testing.assert_allclose(
        np.asarray(got, np.float64), exact / root * scale, rtol=2e-3, atol=2e-3
    )
    x = jnp.asarray(x)
    np.testing.assert_allclose(rms_norm(x), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6))
    # A constant row: NaN where ε = 1e-12 vanishes, zeros here, with a finite gradient.
    constant = jnp.full((1, 8), 3.0, jnp.float16)
    assert not np.asarray(layer_norm(constant, eps=1e-12)).any()
    assert np.isfinite(np.asarray(jax.grad(lambda x: layer_norm(x).sum())(constant))).all()
    with pytest.raises(ValueError, match="eps must be"):
        rms_norm(constant, eps=-1.0)
    with pytest.raises(TypeError, match="x must be an array of real floating"):
        layer_norm(jnp.arange(3))


def test_report_counts_by_hand():
    x = jnp.asarray(
        [0.0, -0.0, 2.0**-24, -(2.0**-15), 2.0**-14, 1.0, jnp.inf, jnp.nan], jnp.float16
    )
    tree = {"block": {"w": x, "ids": jnp.arange(3)}, "empty": jnp.zeros((0,))}
    reports = jax.jit(precision_report)(tree)
    assert set(reports) == {"block/w", "empty"}
    report = reports["block/w"]
    assert [float(v) for v in report[:4]] == [0.25, 0.25, 0.25, 1.0]
    assert np.isnan(report.absorbed)


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.float16, 11), (jnp.bfloat16, 8)])
def test_updates_that_rounding_absorbs(dtype, bits):
    """Card: less than 2^-12 (2^-9) of a weight is always lost, up to 2^-11 (2^-8) it may be."""
    weights = jnp.asarray(1 + np.arange(64) / 64, dtype)
    for size, share in ((-1, 1.0), (1, 0.0)):
        step = jnp.asarray(weights, jnp.float32) * 2.0 ** (size - bits) * (1 - 2e-3 * -size)
        if size < 0:
            step = step * 0.99
        report = precision_report(weights, updates=step)[""]
        assert float(report.absorbed) == share
    unmoved = precision_report(weights, updates=jnp.zeros(64))[""]
    assert float(unmoved.absorbed) == 0.0
    with pytest.raises(ValueError, match="updates must have the structure"):
        precision_report({"w": weights}, updates={})
    with pytest.raises(ValueError, match="updates at 'w' must have shape"):
        precision_report({"w": weights}, updates={"w": jnp.zeros(3)})
