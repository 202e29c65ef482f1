"""Layers: one protocol, the same outputs by convolution, by steps and by prefill."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkit.ssm import S4, S5, Recurrent

LAYERS = {
    "dplr": lambda **o: S4(3, 4, l_max=12, rngs=nnx.Rngs(0), dtype=jnp.float64, **o),
    "diag": lambda **o: S4(
        3, 4, kernel="diag", init="lin", rngs=nnx.Rngs(0), dtype=jnp.float64, **o
    ),
    "real": lambda **o: S4(
        3, 4, kernel="diag", init="real", rngs=nnx.Rngs(0), dtype=jnp.float64, **o
    ),
    "rtf": lambda **o: S4(3, 4, kernel="rtf", l_max=12, rngs=nnx.Rngs(0), dtype=jnp.float64, **o),
    "s5": lambda **o: S5(3, 4, rngs=nnx.Rngs(0), dtype=jnp.float64, **o),
    "gru": lambda: Recurrent(3, cell="gru", rngs=nnx.Rngs(0), dtype=jnp.float64),
    "lstm": lambda: Recurrent(3, cell="lstm", rngs=nnx.Rngs(0), dtype=jnp.float64),
}


def inputs(length=9, heads=3):
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, length, heads)))


@pytest.mark.parametrize("name", LAYERS)
def test_convolution_steps_and_prefill_agree(name):
    layer = LAYERS[name]()
    u = inputs()
    y = layer(u)
    system, state = layer.discretize(), layer.init_state((2,))
    graph, values = nnx.split(layer)

    def body(state, x):
        out, state = nnx.merge(graph, values).step(state, x, system=system)
        return state, out

    last, stepped = jax.lax.scan(body, state, jnp.moveaxis(u, 1, 0))
    np.testing.assert_allclose(jnp.moveaxis(stepped, 0, 1), y, atol=1e-11)
    first, middle = layer.prefill(state, u[:, :4], system=system)
    rest, end = layer.prefill(middle, u[:, 4:])
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), y, atol=1e-11)
    for got, expected in zip(jax.tree.leaves(end), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-11)


@pytest.mark.parametrize("name", ["dplr", "s5"])
def test_causal_by_the_jacobian(name):
    layer = LAYERS[name]()
    jacobian = jax.jacobian(lambda u: layer(u)[:, 0])(inputs(6)[0])[..., 0]
    future = np.triu(np.ones((6, 6)), 1).astype(bool)
    assert abs(np.asarray(jacobian)[future]).max() < 1e-13
    assert abs(np.asarray(jacobian)[~future]).max() > 1e-3


@pytest.mark.parametrize("name", ["dplr", "diag", "rtf"])
def test_bidirectional_is_the_two_sums_of_the_card(name):
    layer = LAYERS[name](bidirectional=True)
    u = np.asarray(inputs(7))
    forward = np.asarray(layer.kernel(7))
    backward = np.asarray(layer.kernel(7, backward=True))
    assert abs(forward - backward).max() > 1e-3
    expected = u * np.asarray(layer.d[...])
    for k in range(7):
        for j in range(7):
            taps = forward[:, k - j] if j <= k else backward[:, j - k - 1]
            expected[:, k] += taps * u[:, j]
    np.testing.assert_allclose(layer(jnp.asarray(u)), expected, atol=1e-12)
    for call in (layer.discretize, layer.init_state):
        with pytest.raises(ValueError, match="bidirectional must be False"):
            call()
    with pytest.raises(ValueError, match="bidirectional must be False"):
        layer.step(None, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="bidirectional must be False"):
        layer.prefill(None, jnp.ones((2, 7, 3)))


def test_lstm_forget_bias_is_one():
    cell = Recurrent(3, cell="lstm", rngs=nnx.Rngs(0)).cell
    np.testing.assert_array_equal(cell.dense_h.bias[...], [0] * 3 + [1] * 3 + [0] * 6)


def test_errors_name_the_argument():
    layer = LAYERS["dplr"]()
    build = lambda **o: S4(4, 8, **{"l_max": 8, "rngs": nnx.Rngs(0)} | o)
    cases = [
        (lambda: layer(jnp.ones((13, 3))), "length must be at most l_max = 12"),
        (lambda: layer(jnp.ones((5, 4))), "u must have shape"),
        (lambda: layer.kernel(4, backward=True), "backward needs a bidirectional"),
        (lambda: build(kernel="dpl"), "Did you mean 'dplr'"),
        (lambda: build(l_max=None), "l_max must be given for 'dplr'"),
        (lambda: build(l_max=None, kernel="diag", discretization="softmax"), "'softmax'"),
        (lambda: build(kernel="rtf"), "state_size"),
        (lambda: build(halve_input=True), "halve_input applies"),
        (lambda: build(dt_min=1.0), "dt_min must be less"),
        (lambda: S4(4, 7, l_max=8, rngs=nnx.Rngs(0)), "state_size must be even"),
        (lambda: Recurrent(3, cell="rnn", rngs=nnx.Rngs(0)), "cell must be one of"),
        (lambda: LAYERS["gru"]()(inputs(), rate=2.0), "rate must be 1"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="u must be an array of real"):
        layer(jnp.ones((5, 3), int))
