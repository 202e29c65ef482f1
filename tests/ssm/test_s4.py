"""The DPLR family against dense float64 matrices, and its forms against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.ssm import init as inits
from jaxkit.ssm import s4
from tests.tolerance import tol

INITS = ("legs", "legt", "fout", "lagt", "random")


def make(heads=3, size=8, length=16, **options):
    return s4.init_params(
        jax.random.key(options.pop("seed", 0)), heads, size, l_max=length, dtype=jnp.float64,
        **options,
    )  # fmt: skip


def dense(params, rate=1.0):
    """`(Ā, B̄, C̃)` of every head, complex on the stacked pair members, straight from NumPy."""
    values = {name: np.asarray(value) for name, value in params.items()}
    systems = []
    for head in range(values["c"].shape[0]):
        shared = head // (values["c"].shape[0] // values["b"].shape[0])
        both = lambda x: np.concatenate([x, x.conj()], axis=-1)
        cx = lambda x: x[..., 0] + 1j * x[..., 1]
        eigenvalues = both(-np.exp(values["log_neg_re"][shared]) + 1j * values["im"][shared])
        p = both(cx(values["p"][shared]))
        matrix = np.diag(eigenvalues) - p.T @ p.conj()
        step = np.exp(values["log_step"][head]) * rate
        step = np.broadcast_to(step, (len(eigenvalues) // 2,))
        step = np.concatenate([step, step])[:, None]
        eye = np.eye(len(eigenvalues))
        left = eye - step * matrix / 2
        transition = np.linalg.solve(left, eye + step * matrix / 2)
        input_ = np.linalg.solve(left, step[:, 0] * both(cx(values["b"][shared])))
        systems.append((transition, input_, both(cx(values["c"][head]))))
    return systems


def dense_c(transition, tilde, length):
    eye = np.eye(len(tilde))
    return np.linalg.solve((eye - np.linalg.matrix_power(transition, length)).T, tilde)


def power_kernel(params, length, l_max, rate=1.0):
    """`C Ā^l B̄` by power iteration; C from C̃ with the step of rate 1."""
    rows = []
    for (first, _, tilde), (transition, x, _) in zip(
        dense(params), dense(params, rate), strict=True
    ):
        c = dense_c(first, tilde, l_max)
        taps = []
        for _ in range(length):
            taps.append((c @ x).real)
            x = transition @ x
        rows.append(taps)
    return np.array(rows)


def convolve(kernel, u, skip):
    """Causal convolution and skip, u `[length, heads]`."""
    columns = [np.convolve(u[:, h], kernel[h])[: len(u)] for h in range(u.shape[1])]
    return np.stack(columns, axis=-1) + u * np.asarray(skip)


def close(got, expected, bound=1e-12):
    expected = np.asarray(expected)
    assert np.shape(got) == expected.shape
    error = abs(np.asarray(got) - expected).max() / max(abs(expected).max(), 1e-300)
    assert error <= bound, error


@pytest.mark.parametrize(
    ("init", "tie_step", "length"),
    [(init, index % 2 == 0, 16 + index % 2) for index, init in enumerate(INITS)]
    + [("legs", False, 16), ("legt", True, 17), ("legs", True, 1), ("legs", True, 2)],
)
def test_kernel_power_step_chunks_and_scan_agree(init, tie_step, length):
    params = make(init=init, tie_step=tie_step, length=length)
    expected = power_kernel(params, length, length)
    # The real mode of FouT has Λ = -1e-4: at z = 1 its sum of order 1/(ε|Λ|) cancels in the
    # Woodbury correction and takes those digits along.
    bound = 1e-12 if init != "fout" else 1e-10
    close(s4.kernel(params, length), expected, bound)

    u = np.random.default_rng(1).standard_normal((length, 3))
    y = convolve(expected, u, params["d"])
    system = s4.discretize(params, l_max=length)
    zero = s4.init_state(3, 8, dtype=jnp.float64)

    state, outputs = zero, []
    step = jax.jit(s4.step)
    for row in u:
        out, state = step(system, state, jnp.asarray(row))
        outputs.append(out)
    close(jnp.stack(outputs), y, bound)

    def body(state, row):
        out, state = s4.step(system, state, row)
        return state, out

    last, scanned = jax.lax.scan(body, zero, jnp.asarray(u))
    close(scanned, y, bound)
    chunked, end = s4.prefill(system, zero, jnp.asarray(u), chunk_size=5)
    close(chunked, y, bound)
    close(end, state)
    close(last, state)


@pytest.mark.parametrize("init", ["legs", "legt"])
def test_transition_is_the_dense_matrix(init):
    params = make(init=init)
    got = np.asarray(s4.transition(s4.discretize(params, l_max=16)))
    x = np.random.default_rng(0).standard_normal((4, 2)) @ [1, 1j]
    for real, (transition, _, _) in zip(got, dense(params), strict=True):
        expected = (transition @ np.concatenate([x, x.conj()]))[:4]
        close(real @ np.concatenate([x.real, x.imag]), np.r_[expected.real, expected.imag], 1e-13)


def legs_2(step, c):
    """LegS with N = 2 and the read-out `c` in the real basis, as parameters with C (not C̃)."""
    matrix = np.array([[-1.0, 0.0], [-np.sqrt(3), -2.0]])
    b = np.array([1.0, np.sqrt(3)])
    system = inits.dplr("legs", 2)
    both = lambda x: np.concatenate([x, x.conj()], axis=-1)
    p = both(system.low_rank)
    modal = np.diag(both(system.eigenvalues)) - p.T @ p.conj()
    # c as a combination of B and AB has the same coefficients in both bases.
    weights = np.linalg.solve(np.stack([b, matrix @ b], axis=1), np.asarray(c, float))
    column = np.stack([both(system.input), modal @ both(system.input)], axis=1) @ weights
    row = column.conj()[:1]
    params = {
        "log_neg_re": np.log(-system.eigenvalues.real)[None],
        "im": system.eigenvalues.imag[None],
        "p": np.stack([system.low_rank.real, system.low_rank.imag], -1)[None],
        "b": np.stack([system.input.real, system.input.imag], -1)[None],
        "c": np.stack([row.real, row.imag], -1)[None],
        "log_step": np.log([step]),
        "d": np.zeros(1),
    }
    return {k: jnp.asarray(v) for k, v in params.items()}, modal, both(system.input)


def test_legs_2_digits_of_the_card():
    params, modal, input_ = legs_2(0.5, [1.0, 1.0])
    expected = [
        [0.8618802154, 0.2092079856, 0.0228847435, -0.0204825032, -0.0236939517, -0.0180178543]
    ]
    got = s4.kernel(s4.to_truncated(params, length=6), 6)
    np.testing.assert_allclose(got, expected, atol=6e-11)

    cut = s4.to_truncated(params, length=4)
    tilde = np.asarray(cut["c"])[0] @ [1, 1j]
    tilde = np.concatenate([tilde, tilde.conj()])
    # Back to the real basis by what C̃ makes of B and of AB.
    matrix = np.array([[-1.0, 0.0], [-np.sqrt(3), -2.0]])
    b = np.array([1.0, np.sqrt(3)])
    reads = np.array([tilde @ input_, tilde @ modal @ input_])
    real = np.linalg.solve(np.stack([b, matrix @ b]), reads.real)
    np.testing.assert_allclose(real, [1.0734904414, 0.9876543210], atol=6e-11)

    kernel = np.asarray(s4.kernel(cut, 4))[0]
    assert abs(kernel.sum() - real[0]) < 1e-14
    alternating = (kernel * [1, -1, 1, -1]).sum()
    assert abs(alternating - 0.25 * (tilde @ input_).real) < 1e-14


def test_sum_identities_at_larger_size():
    length = 32
    params = make(heads=2, size=16, length=length)
    kernel = np.asarray(s4.kernel(params, length))
    step = np.exp(np.asarray(params["log_step"]))
    cx = lambda x: np.asarray(x) @ [1, 1j]
    tilde_b = 2 * (cx(params["c"]) * cx(params["b"])).sum(-1).real
    alternating = (kernel * (-1.0) ** np.arange(length)).sum(-1)
    close(alternating, step / 2 * tilde_b)
    # e_0 = -A^{-1} B in the real LegS basis, so Σ K = -C̃ A^{-1} B.
    system = inits.dplr("legs", 16)
    p = np.concatenate([system.low_rank, system.low_rank.conj()], axis=-1)
    eigenvalues = np.concatenate([system.eigenvalues, system.eigenvalues.conj()])
    matrix = np.diag(eigenvalues) - p.T @ p.conj()
    first = -np.linalg.solve(matrix, np.concatenate([system.input, system.input.conj()]))
    tilde = cx(params["c"])
    close(kernel.sum(-1), (np.concatenate([tilde, tilde.conj()], -1) @ first).real)


@pytest.mark.parametrize("init", ["legs", "legt", "random"])
def test_doubling_and_change_of_length(init):
    params = make(init=init, length=12)
    double = s4.double_length(params, length=12)
    close(double["c"], s4.change_length(params, length=12, new_length=24)["c"], 1e-13)
    expected = power_kernel(params, 40, 12)
    close(s4.kernel(double, 24), expected[:, :24], 1e-12)
    for length in (5, 40):
        other = s4.change_length(params, length=12, new_length=length)
        close(s4.kernel(other, length), expected[:, :length], 1e-12)
    close(s4.kernel(params, 7, l_max=12), expected[:, :7], 1e-12)


def test_doubling_digits_for_a_benign_matrix():
    params = make(size=16, length=64, dt_min=1e-2, dt_max=1e-1)
    c = s4.from_truncated(params, length=64)
    double = s4.double_length(params, length=64)
    close(double["c"], s4.to_truncated(c, length=128)["c"], 1e-14)


def test_truncation_on_host_and_in_graph_agree():
    params = make(length=12)
    c = s4.from_truncated(params, length=12)
    in_graph = jax.jit(lambda p: s4.from_truncated(p, length=12))(params)
    close(in_graph["c"], c["c"], 1e-13)
    close(s4.to_truncated(c, length=12)["c"], params["c"], 1e-13)
    for (transition, _, tilde), got in zip(
        dense(params), np.asarray(c["c"]) @ [1, 1j], strict=True
    ):
        close(got, dense_c(transition, tilde, 12)[:4], 1e-12)


@pytest.mark.parametrize("rate", [2.0, 0.5])
def test_rate_changes_the_step_exactly(rate):
    params = make(length=24)
    expected = power_kernel(params, 24, 24, rate)
    for length in (24, 12):
        close(s4.kernel(params, length, rate=rate, l_max=24), expected[:, :length])
    changed = s4.change_rate(params, length=24, rate=rate, new_length=12)
    close(s4.kernel(changed, 12), expected[:, :12])
    traced = jax.jit(lambda p, r: s4.kernel(p, 12, rate=r, l_max=24))(params, rate)
    close(traced, expected[:, :12])
    system = s4.discretize(params, l_max=24, rate=rate)
    impulse = jnp.zeros((24, 3)).at[0].set(1.0)
    y, _ = s4.prefill(system, s4.init_state(3, 8, dtype=jnp.float64), impulse)
    close(y.T.at[:, 0].add(-params["d"]), expected)


@pytest.mark.parametrize(("step", "least", "most"), [(0.01, 5e-9, 1e-7), (0.001, 1e-4, 3e-3)])
def test_reused_c_tilde_is_approximate(step, least, most):
    """The shortcut of the reference code: C̃ of L steps read at L/2 nodes with twice the step."""
    length = 1024
    params = make(heads=4, size=64, length=length)
    params["log_step"] = jnp.full(4, np.log(step))
    params["c"] = jax.random.normal(jax.random.key(5), params["c"].shape, jnp.float64)
    params = s4.to_truncated(params, length=length)
    exact = s4.kernel(params, length // 2, rate=2.0, l_max=length)
    doubled = {**params, "log_step": params["log_step"] + np.log(2.0)}
    shortcut = s4.kernel(doubled, length // 2)
    error = float(jnp.abs(shortcut - exact).max() / jnp.abs(exact).max())
    assert least < error < most, error


@pytest.mark.parametrize(("step", "condition"), [(1e-4, 35), (1e-3, 3.6), (1e-2, 1.002)])
def test_condition_of_the_truncation(step, condition):
    params = make(heads=1, size=64, length=4)
    params["log_step"] = jnp.log(jnp.asarray([step]))
    transition = np.asarray(s4.transition(s4.discretize(params, l_max=4)))[0]
    matrix = np.eye(64) - np.linalg.matrix_power(transition, 1024)
    assert abs(np.linalg.cond(matrix) / condition - 1) < 0.03


@pytest.mark.parametrize(("size", "bound"), [(16, 6e-7), (64, 1.5e-6), (256, 1e-5)])
def test_float32_kernel(size, bound):
    """Against float64 from the same float32 numbers, as the card measures.

    The parameters here are logarithms, whose exponentials add a rounding error of their own to the
    poles: up to twice the bound of the card is granted.
    """
    for length in (256, 4096):
        params = s4.init_params(jax.random.key(1), 4, size, l_max=length, dtype=jnp.float32)
        wide = {name: value.astype(jnp.float64) for name, value in params.items()}
        close(s4.kernel(params, length), s4.kernel(wide, length), 2 * bound)


def test_gradients_of_kernel_and_of_recurrence_agree():
    """Two unlike paths: Cauchy sums with their own VJP, and C from C̃ with plain autodiff."""
    params = make(heads=2, size=6, length=9)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9)))

    def by_kernel(params):
        return jnp.sum(weights * s4.kernel(params, 9))

    def by_steps(params):
        system = s4.discretize(params, l_max=9)
        impulse = jnp.zeros((9, 2)).at[0].set(1.0)
        y, _ = s4.prefill(system, s4.init_state(2, 6, dtype=jnp.float64), impulse)
        return jnp.sum(weights * y.T) - jnp.sum(weights[:, 0] * params["d"])

    left, right = jax.grad(by_kernel)(params), jax.grad(by_steps)(params)
    for name in params:
        scale = max(float(jnp.abs(right[name]).max()), 1e-3)
        assert float(jnp.abs(left[name] - right[name]).max()) < 1e-11 * scale, name


@pytest.mark.parametrize("parts", [(7,), (1, 6), (4, 3), (2, 1, 1, 3)])
def test_any_split_gives_the_same_outputs_and_state(parts):
    length, chunk_size = sum(parts), 2
    params = make(heads=2, size=4, length=32, init="legt")
    system = s4.discretize(params, l_max=32)
    zero = s4.init_state(2, 4, batch_shape=(2,), dtype=jnp.float64)
    u = jnp.asarray(np.random.default_rng(length).standard_normal((2, length, 2)))
    y, end = s4.prefill(system, zero, u)
    state, outputs, start = zero, [], 0
    for part in parts:
        block = u[:, start : start + part]
        if part == 1:
            out, state = s4.step(system, state, block[:, 0])
            out = out[:, None]
        else:
            out, state = s4.prefill(system, state, block, chunk_size=chunk_size)
        outputs.append(out)
        start += part
    close(jnp.concatenate(outputs, axis=1), y)
    close(state, end)


def test_prefill_is_convolution_plus_free_response():
    params = make(length=16, tie_step=False, init="legt")
    system = s4.discretize(params, l_max=16)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 4)) + 1j * rng.standard_normal((2, 3, 4)))
    u = rng.standard_normal((2, 11, 3))
    y, _ = s4.prefill(system, x, jnp.asarray(u), chunk_size=4)
    kernel = np.asarray(s4.kernel(params, 11, l_max=16))
    free = s4.free_response(params, x, 11, l_max=16)
    forced = np.stack([convolve(kernel, row, params["d"]) for row in u])
    close(y, forced + np.asarray(free))
    for head, (transition, _, tilde) in enumerate(dense(params)):
        c = dense_c(transition, tilde, 16)
        state = np.concatenate([x[0, head], np.conj(x[0, head])])
        expected = [(c @ np.linalg.matrix_power(transition, k + 1) @ state).real for k in range(11)]
        close(free[0, :, head], expected)


@pytest.mark.parametrize("stability", ["softplus", "relu"])
def test_stability_parametrizations_start_equal_and_stay_stable(stability):
    params, other = make(), make(stability=stability)
    close(s4.kernel(other, 16, stability=stability), s4.kernel(params, 16), 1e-12)
    pushed = {**other, "log_neg_re": other["log_neg_re"] * 0 - 30.0}
    dense_matrix = s4.transition(s4.discretize(pushed, l_max=16, stability=stability))
    assert abs(np.linalg.eigvals(np.asarray(dense_matrix))).max() < 1


def test_shared_systems_and_band_limit():
    params = make(heads=4, n_ssm=2)
    assert params["log_neg_re"].shape == (2, 4)
    assert params["c"].shape == (4, 4, 2)
    close(s4.kernel(params, 16), power_kernel(params, 16, 16))
    spread = {
        name: jnp.repeat(value, 2, axis=0) if value.shape[0] == 2 else value
        for name, value in params.items()
    }
    close(s4.kernel(params, 16), s4.kernel(spread, 16), 1e-15)

    frequency = np.exp(np.asarray(params["log_step"]))[:, None] * np.asarray(spread["im"])
    kept = frequency / (2 * np.pi) < 0.5 * 0.1
    assert kept.any()
    assert not kept.all()
    masked = {**params, "c": params["c"] * kept[..., None].astype(float)}
    close(s4.kernel(params, 16, band_limit=0.1), s4.kernel(masked, 16), 1e-15)
    limited = s4.discretize(params, l_max=16, band_limit=0.1)
    close(limited.output, s4.discretize(masked, l_max=16).output, 1e-15)


def test_low_rank_states_on_the_axis_start_at_a_small_decay():
    for init in ("legt", "fout", "lagt"):
        np.testing.assert_allclose(-np.exp(make(init=init)["log_neg_re"]), -1e-4, rtol=1e-12)


def test_vmap_over_seeds_and_draws():
    keys = jax.random.split(jax.random.key(0), 3)
    create = lambda key: s4.init_params(key, 2, 8, l_max=12, dtype=jnp.float64)
    stacked = jax.vmap(create)(keys)
    kernels = jax.jit(jax.vmap(lambda p: s4.kernel(p, 12)))(stacked)
    for key, got in zip(keys, kernels, strict=True):
        close(got, s4.kernel(create(key), 12), 1e-12)
    params = make(heads=4000, size=2, length=4, dt_min=1e-3, dt_max=1e-1)
    c = s4.from_truncated(params, length=4)["c"]
    assert abs(float(jnp.mean(c**2)) - 0.5) < 0.03
    steps = params["log_step"]
    assert np.log(1e-3) <= float(steps.min()) < float(steps.max()) <= np.log(1e-1)
    assert abs(float(steps.mean()) - np.log(1e-2)) < 0.1


@pytest.mark.x32
def test_bfloat16_and_float32_inputs():
    params = s4.init_params(jax.random.key(0), 3, 8, l_max=16)
    assert all(value.dtype == jnp.float32 for value in params.values())
    system = s4.discretize(params, l_max=16)
    u = jax.random.normal(jax.random.key(1), (16, 3))
    zero = s4.init_state(3, 8)
    y, _ = s4.prefill(system, zero, u)
    close(y, convolve(np.asarray(s4.kernel(params, 16)), np.asarray(u), params["d"]), 4e-6)
    half, state = s4.prefill(system, zero, u.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert state.dtype == jnp.complex64
    close(half.astype(jnp.float32), y, tol("bfloat16"))


def test_errors_name_the_argument():
    key = jax.random.key(0)
    build = lambda **options: s4.init_params(key, **{"heads": 4, "state_size": 8, "l_max": 16} | options)  # fmt: skip  # noqa: E501
    params, system = make(), s4.discretize(make(), l_max=16)
    zero = s4.init_state(3, 8, dtype=jnp.float64)
    unstable = inits.DPLR(np.full(4, 0.1 + 1j), np.ones((1, 4), complex), np.ones(4, complex))
    cases = [
        (lambda: build(state_size=7), "state_size must be even"),
        (lambda: build(heads=0), "heads must be at least 1"),
        (lambda: build(l_max=0), "l_max must be at least 1"),
        (lambda: build(dt_min=0.0), "dt_min must be greater than 0"),
        (lambda: build(dt_min=0.1, dt_max=0.1), "dt_min must be less than dt_max"),
        (lambda: build(n_ssm=3), "n_ssm must divide heads"),
        (lambda: build(init="hippo"), "init must be one of"),
        (lambda: build(init=unstable), "negative real parts"),
        (lambda: build(init=inits.dplr("legs", 4)), "init must have parts"),
        (lambda: build(stability="tanh"), "stability must be one of"),
        (lambda: s4.kernel(params, 0), "length must be at least 1"),
        (lambda: s4.kernel(params, 17, l_max=16), "length must be at most l_max = 16"),
        (lambda: s4.kernel(params, 16, rate=0.0), "rate must be greater than 0"),
        (lambda: s4.kernel(params, 16, band_limit=-1.0), "band_limit must be greater"),
        (lambda: s4.step(system, zero, jnp.ones(4)), "u must have shape"),
        (lambda: s4.step(system, zero[None], jnp.ones(3)), "state must have shape"),
        (lambda: s4.prefill(system, zero, jnp.ones((5, 4))), "u must have shape"),
        (lambda: s4.prefill(system, zero, jnp.ones((5, 3)), chunk_size=0), "chunk_size"),
        (lambda: s4.double_length(params, length=0), "length must be at least 1"),
        (lambda: s4.change_rate(params, length=16, rate=-1.0), "rate must be greater"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="u must be an array of real"):
        s4.step(system, zero, jnp.ones(3, complex))
    with pytest.raises(TypeError, match="u must be an array of real"):
        s4.prefill(system, zero, jnp.ones((5, 3), int))
    with pytest.raises(TypeError, match="dtype must be float32 or float64"):
        build(dtype=jnp.bfloat16)
