"""HiPPO-RNN and LMU cells: their memories, their state, and their training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkit.ssm import hippo

WINDOWED = {"measure": "legt", "window": 6.0}
KINDS = (("gru", {"measure": "legs"}), ("lstm", WINDOWED), ("simple", WINDOWED))


@pytest.mark.parametrize(
    "keywords",
    [
        {"measure": "legs"},
        {"measure": "legs", "method": "exact"},
        WINDOWED,
        {"measure": "fout", "window": 6.0, "method": "bilinear", "dt": 0.5},
        {"measure": "lagt", "window": 3.0, "decay": 0.5},
    ],
)
def test_memory_is_the_projection(keywords):
    u = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 9)))
    memory = hippo.HippoMemory(3, 5, param_dtype=jnp.float64, **keywords)
    step = jax.jit(memory.step)
    c, system = memory.init_state((2,)), memory.system()
    for k in range(9):
        c = step(system, c, u[..., k], jnp.asarray(k))
    same = {"dt": 1.0} | keywords
    np.testing.assert_allclose(c, hippo.project(u, 5, last_only=True, **same), atol=1e-12)


def cells():
    make = {
        f"hippo-{kind}-{keywords['measure']}": functools.partial(
            hippo.HippoCell, 3, 4, 5, memories=2, cell=kind, **keywords
        )
        for kind, keywords in (
            ("gru", {"measure": "legs"}),
            ("lstm", WINDOWED),
            ("simple", WINDOWED),
        )
    }
    make["lmu"] = functools.partial(hippo.LMUCell, 3, 4, 5, window=6.0, memories=2)
    return make


@pytest.mark.parametrize("name", cells())
def test_scan_equals_steps_at_any_cut(name):
    cell = cells()[name](rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 7, 3)))
    ys, last = nnx.jit(lambda cell, x: cell.scan(x))(cell, x)
    assert ys.shape == (2, 7, 4)
    assert last.memory.shape == (2, 2, 5)
    assert int(last.steps) == 7
    first, state = cell.scan(x[:, :4])
    step = nnx.jit(lambda cell, state, x: cell.step(state, x))
    out = [first]
    for k in range(4, 7):
        y, state = step(cell, state, x[:, k])
        out.append(y[:, None])
    np.testing.assert_allclose(jnp.concatenate(out, 1), ys, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), state, last)
    # Causal: an output does not move with later inputs.
    moved, _ = cell.scan(x.at[:, 5].add(1.0))
    np.testing.assert_array_equal(moved[:, :5], cell.scan(x)[0][:, :5])
    assert np.abs(moved[:, 5:] - ys[:, 5:]).min() > 0


@pytest.mark.parametrize("name", cells())
def test_every_parameter_gets_a_gradient(name):
    learn = {} if "legs" in name else {"learn_step": True}
    cell = cells()[name](rngs=nnx.Rngs(0), param_dtype=jnp.float64, **learn)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 6, 3)))
    grads = nnx.grad(lambda cell: jnp.sum(cell.scan(x)[0] ** 2))(cell)
    leaves = jax.tree.leaves(grads)
    assert leaves
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in leaves)
    if learn:
        h = 1e-6
        plain = cell.memory.log_step[...]

        def loss(shift):
            cell.memory.log_step[...] = plain + shift
            return float(jnp.sum(cell.scan(x)[0] ** 2))

        up, down = loss(jnp.asarray([h, 0.0])), loss(jnp.asarray([-h, 0.0]))
        slope = (up - down) / (2 * h)
        np.testing.assert_allclose(grads.memory.log_step[...][0], slope, rtol=1e-6, atol=1e-9)


def test_lmu_equations():
    cell = hippo.LMUCell(3, 4, 5, window=6.0, rngs=nnx.Rngs(3), param_dtype=jnp.float64)
    rng = np.random.default_rng(3)
    cell.write_m.kernel[...] = jnp.asarray(rng.standard_normal((5, 1)))
    x = rng.standard_normal((6, 3))
    w = {
        name: np.asarray(getattr(cell, name).kernel[...])
        for name in ("write_x", "write_h", "write_m", "read_x", "read_h", "read_m")
    }
    A, B = (np.asarray(v[0]) for v in cell.memory.system())
    h, m, ys = np.zeros(4), np.zeros(5), []
    for row in x:
        u = row @ w["write_x"] + h @ w["write_h"] + m @ w["write_m"]
        m = A @ m + B * u
        h = np.tanh(row @ w["read_x"] + h @ w["read_h"] + m @ w["read_m"])
        ys.append(h)
    np.testing.assert_allclose(cell.scan(jnp.asarray(x))[0], np.stack(ys), atol=1e-13)


def test_hippo_rnn_remembers_what_it_wrote():
    cell = hippo.HippoCell(2, 4, 6, rngs=nnx.Rngs(4), param_dtype=jnp.float64)
    ys, state = cell.scan(jnp.asarray(np.random.default_rng(4).standard_normal((8, 2))))
    written = (ys @ cell.write.kernel[...]).T
    np.testing.assert_allclose(state.memory, hippo.project(written, 6, last_only=True), atol=1e-13)


@pytest.mark.x32
def test_inputs_keep_their_dtype():
    cell = hippo.HippoCell(2, 4, 6, rngs=nnx.Rngs(5))
    y, state = cell.step(cell.init_state(), jnp.ones(2, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert state.memory.dtype == jnp.float32


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"cell": "rnn"}, ValueError, "cell must be one of"),
        ({"measure": "fous"}, ValueError, "measure must be one of"),
        ({"measure": "legt"}, ValueError, "window must be given"),
        ({"measure": "legt", "window": 0.0}, ValueError, "window must be greater"),
        ({"measure": "legt", "window": 1.0, "dt": -1.0}, ValueError, "dt must be greater"),
        ({"learn_step": True}, ValueError, "learn_step must be False"),
        ({"N": 17, "method": "forward"}, ValueError, "LegS cannot take"),
        ({"N": 4, "measure": "fout", "window": 1.0}, ValueError, "N must be odd"),
        ({"method": "zoh"}, ValueError, "method must be one of"),
        ({"memories": 0}, ValueError, "memories must be at least 1"),
        ({"hidden_features": 0}, ValueError, "hidden_features must be at least 1"),
        ({"alpha": 2.0}, ValueError, "alpha must be"),
    ],
)
def test_errors_name_the_argument(keywords, error, words):
    arguments = {"in_features": 2, "hidden_features": 3, "N": 5, "rngs": nnx.Rngs(0)} | keywords
    with pytest.raises(error, match=words):
        hippo.HippoCell(**arguments)


def test_input_errors():
    cell = hippo.HippoCell(2, 3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="x must have 2 features"):
        cell.scan(jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="x must be"):
        cell.scan(jnp.ones(2))
    with pytest.raises(TypeError, match="x must be"):
        cell.step(cell.init_state(), jnp.ones(2, int))
