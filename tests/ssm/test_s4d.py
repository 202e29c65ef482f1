"""The diagonal family against NumPy, the definitions of the papers, and its own recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.ssm import init as inits
from jaxkit.ssm import s4d
from tests.tolerance import tol


def make(heads=3, size=8, **options):
    key = jax.random.key(options.pop("seed", 0))
    return s4d.init_params(key, heads, size, dtype=jnp.float64, **options)


def spectrum(params):
    """`(ε, Λ, B, C)` `[heads, modes]` in NumPy, the factor of the pair in C."""
    values = {name: np.asarray(value) for name, value in params.items()}
    heads = len(values["c"])
    repeat = lambda x: np.repeat(x, heads // len(x), axis=0)
    eigenvalues = -np.exp(values["log_neg_re"])
    b, c = values["b"], values["c"]
    if "im" in values:
        eigenvalues = eigenvalues + 1j * values["im"]
        b, c = b @ [1, 1j], 2 * (c @ [1, 1j])
    step = np.exp(values["log_step"])
    step = step[:, None] if step.ndim == 1 else step
    return step, repeat(eigenvalues), repeat(b), c


def reference_kernel(params, length, discretization="zoh", rate=1.0, l_max=None):
    """`Σ C Ā^l B̄` written out."""
    step, eigenvalues, b, c = spectrum(params)
    scaled = rate * step * eigenvalues
    if discretization == "bilinear":
        transition = (1 + scaled / 2) / (1 - scaled / 2)
        input_ = rate * step * b / (1 - scaled / 2)
    else:
        transition, input_ = np.exp(scaled), np.expm1(scaled) / eigenvalues * b
    if discretization == "softmax":
        c = c / np.expm1((l_max or length) * step * eigenvalues)
    powers = transition[..., None] ** np.arange(length)
    return ((c * input_)[..., None] * powers).sum(1).real


def close(got, expected, bound=1e-12):
    expected = np.asarray(expected)
    assert np.shape(got) == expected.shape
    error = abs(np.asarray(got) - expected).max() / max(abs(expected).max(), 1e-300)
    assert error <= bound, error


@pytest.mark.parametrize("discretization", s4d.DISCRETIZATIONS)
@pytest.mark.parametrize("init", inits.DIAGONAL_INITS)
def test_kernel_power_step_and_chunks_agree(init, discretization):
    length = 17 if init in ("lin", "real") else 16
    params = make(init=init, tie_step=init != "inv", n_ssm=1 if init == "legs" else None)
    expected = reference_kernel(params, length, discretization)
    close(s4d.kernel(params, length, discretization=discretization), expected)

    u = np.random.default_rng(1).standard_normal((length, 3))
    columns = [np.convolve(u[:, h], expected[h])[:length] for h in range(3)]
    y = np.stack(columns, axis=-1) + u * np.asarray(params["d"])
    system = s4d.discretize(params, l_max=length, discretization=discretization)
    zero = s4d.init_state(3, 8, real=init == "real", dtype=jnp.float64)

    def body(state, row):
        out, state = s4d.step(system, state, row)
        return state, out

    state, stepped = jax.lax.scan(body, zero, jnp.asarray(u))
    close(stepped, y)
    for chunk_size in (5, 64):
        chunked, end = s4d.prefill(system, zero, jnp.asarray(u), chunk_size=chunk_size)
        close(chunked, y)
        close(end, state)
    if discretization == "zoh":
        scanned, end = s4d.apply_irregular(params, jnp.asarray(u), jnp.ones(length))
        close(scanned, y)
        close(end, state)


def test_prefill_in_parts_with_steps_between():
    params = make(init="inv")
    system = s4d.discretize(params)
    zero = s4d.init_state(3, 8, batch_shape=(2,), dtype=jnp.float64)
    u = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 3)))
    y, end = s4d.prefill(system, zero, u)
    first, state = s4d.prefill(system, zero, u[:, :4], chunk_size=3)
    second, state = s4d.step(system, state, u[:, 4])
    third, state = s4d.prefill(system, state, u[:, 5:], chunk_size=4)
    close(jnp.concatenate([first, second[:, None], third], axis=1), y)
    close(state, end)


@pytest.mark.parametrize("discretization", s4d.DISCRETIZATIONS)
@pytest.mark.parametrize("init", ["lin", "real"])
def test_prefill_is_convolution_plus_free_response(init, discretization):
    params = make(init=init)
    options = {"discretization": discretization, "l_max": 16}
    system = s4d.discretize(params, **options)
    rng = np.random.default_rng(0)
    zero = s4d.init_state(3, 8, real=init == "real", batch_shape=(2,), dtype=jnp.float64)
    x = jnp.asarray(rng.standard_normal(zero.shape)).astype(zero.dtype)
    x = x * (1 if init == "real" else 1 + 0.5j)
    silent = jnp.zeros((2, 11, 3))
    y, _ = s4d.prefill(system, x, silent)
    close(s4d.free_response(params, x, 11, **options), y)
    u = jnp.asarray(rng.standard_normal((2, 11, 3)))
    both, _ = s4d.prefill(system, x, u)
    forced, _ = s4d.prefill(system, zero, u)
    close(both, forced + y)


def test_dss_softmax_is_a_softmax_over_positions():
    length = 12
    params = make(init="lin")
    step, eigenvalues, b, c = spectrum(params)
    powers = np.exp((step * eigenvalues)[..., None] * np.arange(length))
    softmax = powers / powers.sum(-1, keepdims=True)
    expected = ((c * b / eigenvalues)[..., None] * softmax).sum(1).real
    close(s4d.kernel(params, length, discretization="softmax"), expected)
    # The same as DSS-exp with w/(e^{LεΛ} − 1), and a prefix of it at the same l_max.
    short = s4d.kernel(params, 5, l_max=length, discretization="softmax")
    close(short, expected[:, :5])
    rated = s4d.kernel(params, 6, rate=2.0, l_max=length, discretization="softmax")
    close(rated, reference_kernel(params, 6, "softmax", rate=2.0, l_max=length))


@pytest.mark.parametrize("init", ["lin", "legs", "real"])
def test_zoh_rate_identity(init):
    params = make(init=init, dt_min=1e-2, dt_max=1.0)
    full = np.asarray(s4d.kernel(params, 32))
    close(s4d.kernel(params, 16, rate=2.0), full[:, ::2] + full[:, 1::2], 2e-15)
    close(s4d.kernel(s4d.change_rate(params, rate=2.0), 16), full[:, ::2] + full[:, 1::2], 2e-15)


def test_bilinear_has_no_rate_identity():
    params = make(init="lin", size=64, dt_min=0.1, dt_max=1.0)
    full = np.asarray(s4d.kernel(params, 32, discretization="bilinear"))
    half = np.asarray(s4d.kernel(params, 16, rate=2.0, discretization="bilinear"))
    paired = full[:, ::2] + full[:, 1::2]
    assert abs(half - paired).max() > 0.1 * abs(paired).max()


def test_irregular_steps():
    params = make(init="legs")
    rng = np.random.default_rng(0)
    u = rng.standard_normal((2, 7, 3))
    steps = rng.uniform(0.2, 3.0, (2, 7))
    start = rng.standard_normal((2, 3, 4)) + 1j * rng.standard_normal((2, 3, 4))
    y, end = s4d.apply_irregular(
        params, jnp.asarray(u), jnp.asarray(steps), state=jnp.asarray(start)
    )
    step, eigenvalues, b, c = spectrum(params)
    state, expected = start, []
    for k in range(7):
        scaled = step * eigenvalues * steps[:, k, None, None]
        drive = np.expm1(scaled) / eigenvalues * b * u[:, k, :, None]
        state = np.exp(scaled) * state + drive
        expected.append((c * state).sum(-1).real + u[:, k] * np.asarray(params["d"]))
    close(y, np.stack(expected, axis=1))
    close(end, state)
    # A held input may be cut anywhere: its last state stays.
    twice = jnp.repeat(jnp.asarray(u), 2, axis=1)
    parts = jnp.repeat(jnp.asarray(steps) / 2, 2, axis=1)
    cut, same = s4d.apply_irregular(params, twice, parts, state=jnp.asarray(start))
    close(same, end)
    close(cut[:, 1::2], y)


def test_gradients_of_kernel_and_of_recurrence_agree():
    params = make(heads=2, size=6, init="lin")
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9)))

    def by_kernel(params):
        return jnp.sum(weights * s4d.kernel(params, 9)) + jnp.sum(weights[:, 0] * params["d"])

    def by_scan(params):
        impulse = jnp.zeros((9, 2)).at[0].set(1.0)
        y, _ = s4d.apply_irregular(params, impulse, jnp.ones(9))
        return jnp.sum(weights * y.T)

    left, right = jax.grad(by_kernel)(params), jax.grad(by_scan)(params)
    for name in params:
        close(left[name], right[name], 1e-12)


@pytest.mark.parametrize(
    ("init", "size", "bound"),
    [("lin", 64, 4.3e-6), ("inv", 64, 5.7e-5), ("legs", 64, 5.7e-5), ("legs", 256, 9e-4)],
)
def test_float32_kernel(init, size, bound):
    """The card's phase error `(2/e) 2^{-24} |Im Λ|max`, from the same float32 numbers."""
    for length in (256, 4096):
        params = s4d.init_params(jax.random.key(1), 4, size, init=init, dtype=jnp.float32)
        wide = {name: value.astype(jnp.float64) for name, value in params.items()}
        close(s4d.kernel(params, length), s4d.kernel(wide, length), bound)


def test_sharing_stability_and_band_limit():
    params = make(heads=4, n_ssm=2, init="lin")
    assert params["im"].shape == (2, 4)
    close(s4d.kernel(params, 16), reference_kernel(params, 16))
    for stability in ("softplus", "relu"):
        other = make(heads=4, n_ssm=2, init="lin", stability=stability)
        close(s4d.kernel(other, 16, stability=stability), s4d.kernel(params, 16), 1e-12)
    step, eigenvalues, _, _ = spectrum(params)
    kept = step * eigenvalues.imag / (2 * np.pi) < 0.5 * 0.05
    assert kept.any()
    assert not kept.all()
    masked = {**params, "c": params["c"] * kept[..., None].astype(float)}
    close(s4d.kernel(params, 16, band_limit=0.05), s4d.kernel(masked, 16), 1e-15)


def test_real_random_and_given_spectra():
    real = make(init="real", size=5)
    assert "im" not in real
    assert real["c"].shape == (3, 5)
    given = inits.Diagonal(np.array([-0.3 + 2j, -0.1 + 0j]), np.array([1.0 + 0j, 2.0]))
    params = make(size=4, init=given)
    close(s4d.kernel(params, 8), reference_kernel(params, 8))
    random = make(init="random")
    assert float(jnp.std(random["log_neg_re"])) > 0.3


@pytest.mark.x32
def test_dtypes_follow_the_input():
    params = s4d.init_params(jax.random.key(0), 3, 8)
    system = s4d.discretize(params)
    u = jax.random.normal(jax.random.key(1), (10, 3))
    y, state = s4d.prefill(system, s4d.init_state(3, 8), u)
    assert y.dtype == jnp.float32
    assert state.dtype == jnp.complex64
    half, _ = s4d.prefill(system, s4d.init_state(3, 8), u.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), y, tol("bfloat16"))


def test_errors_name_the_argument():
    key = jax.random.key(0)
    params = make()
    system, zero = s4d.discretize(params), s4d.init_state(3, 8, dtype=jnp.float64)
    unstable = inits.Diagonal(np.array([0.0 + 1j]), np.array([1.0 + 0j]))
    u = jnp.ones((5, 3))
    cases = [
        (lambda: s4d.init_params(key, 2, 7), "state_size must be even"),
        (lambda: s4d.init_params(key, 2, 2, init=unstable), "negative real parts"),
        (lambda: s4d.init_params(key, 2, 4, init=unstable), "init must have parts"),
        (lambda: s4d.init_params(key, 2, 4, dt_min=0.2, dt_max=0.1), "dt_min must be less"),
        (lambda: s4d.init_params(key, 2, 4, dt_min=-1.0), "dt_min must be greater"),
        (lambda: s4d.kernel(params, 0), "length must be at least 1"),
        (lambda: s4d.kernel(params, 4, discretization="euler"), "discretization must be one"),
        (lambda: s4d.kernel(params, 4, rate=0), "rate must be greater"),
        (lambda: s4d.discretize(params, discretization="softmax"), "l_max must be given"),
        (lambda: s4d.step(system, zero, jnp.ones(2)), "u must have shape"),
        (lambda: s4d.prefill(system, zero, jnp.ones((5, 2))), "u must have shape"),
        (lambda: s4d.prefill(system, zero[None], u), "state must have shape"),
        (lambda: s4d.apply_irregular(params, u, jnp.ones(4)), "steps must have shape"),
        (lambda: s4d.apply_irregular(params, u, jnp.zeros(5)), "steps must be positive"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="u must be an array of real"):
        s4d.step(system, zero, jnp.ones(3, complex))
