"""The measuring core, the counted roofline, the comparison forms and `jaxkit bench ssm`."""

import io
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from jaxkit_experiments.speed import bench, measure, peers, roofline
from jaxkit_experiments.speed import ssm as bench_ssm
from rich.console import Console

from tests.tolerance import tol


def test_compare_interleaves_and_orders_functions():
    order = []

    def call(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)
            return jnp.zeros(())

        return run

    timings = measure.compare(
        {"slow": call("slow", 0.02), "fast": call("fast", 0.005)}, repeats=4, min_sample=1e-3
    )
    assert measure.speedup(timings["slow"], timings["fast"]) > 2
    # Two calls each to warm up and to size the sample, then rounds in rotating order; a turn is an
    # untimed call and a timed one.
    turns = ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert order[4:] == [name for name in turns for _ in range(2)]
    assert timings["slow"].best >= 0.02
    assert len(timings["slow"].samples) == 4


def test_compare_repeats_short_functions_within_a_sample():
    calls = []
    timing = measure.compare(
        {"short": lambda: calls.append(0) or time.sleep(1e-3)}, repeats=3, min_sample=5e-3
    )
    assert len(calls) > 2 + 3
    assert timing["short"].median >= 1e-3


def test_compare_stops_at_its_budget_after_three_rounds():
    timing = measure.compare({"f": lambda: time.sleep(0.01)}, repeats=50, budget=1e-3)
    assert len(timing["f"].samples) == 3


def test_speedup_pairs_rounds_so_that_a_burst_cancels():
    # The machine slows down tenfold in the last two of five rounds.
    load = np.array([1, 1, 1, 10, 10])
    slow = measure.Timing("slow", tuple(3e-3 * load))
    fast = measure.Timing("fast", tuple(1e-3 * load))
    assert measure.speedup(slow, fast) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="same rounds"):
        measure.speedup(slow, measure.Timing("other", (1.0,)))


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"warmup": 0}])
def test_compare_rejects(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        measure.compare({"f": lambda: None}, **bad)
    with pytest.raises(ValueError, match="functions"):
        measure.compare({})


def test_fit_slope_recovers_the_exponent():
    sizes = np.array([1024, 4096, 65536])
    assert measure.fit_slope(sizes, 7e-6 * sizes**1.13) == pytest.approx(1.13, abs=1e-12)
    with pytest.raises(ValueError, match="sizes"):
        measure.fit_slope([4.0], [1.0])


def test_memory_sees_an_intermediate_and_its_absence():
    n = 512
    x = jax.ShapeDtypeStruct((n,), jnp.float32)

    def outer(x):  # sorting the rows keeps the compiler from fusing the square away
        return jnp.sum(jnp.sort(x[:, None] * x[None, :], axis=0), axis=0)

    assert measure.measure_memory(outer, x).temp >= n * n * 4
    assert measure.measure_memory(lambda x: 2 * x, x).temp < n * 4


def test_environment_names_device_versions_and_commit():
    environment = measure.environment()
    assert environment["platform"] == jax.devices()[0].platform
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["commit"] is None or len(environment["commit"]) >= 40
    json.dumps(environment, allow_nan=False)


def test_write_json_is_whole_or_absent(tmp_path):
    path = measure.write_json(tmp_path / "deep" / "a.json", {"t": measure.Timing("t", (1.0, 3.0))})
    assert json.loads(path.read_text())["t"]["median"] == 2.0
    plan = measure.Memory(temp=1, arguments=2, outputs=3, peak=6)
    measure.write_json(path, {"plans": [plan], "t": measure.Timing("t", (2.0,))})
    assert json.loads(path.read_text())["plans"][0]["peak"] == 6
    assert json.loads(path.read_text())["t"]["median"] == 2.0
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("function", "args", "vector", "matrix"),
    [
        (lambda x, y: x * y + jnp.exp(x), (f32(3, 5), f32(3, 5)), 45, 0),
        (lambda x, y: x @ y, (f32(3, 5), f32(5, 7)), 0, 2 * 3 * 5 * 7),
        (lambda x: jnp.sum(x), (f32(6, 4),), 24, 0),
        (lambda x: x**3, (f32(10),), 20, 0),
        (lambda x: jax.lax.scan(lambda c, r: (c + r, None), x[0], x)[0], (f32(8, 4),), 32, 0),
        (lambda x: jax.lax.fori_loop(0, 5, lambda _, c: c * c, x), (f32(4),), 20, 0),
        (lambda x: jax.jit(lambda y: y * y)(x).T.reshape(-1), (f32(3, 4),), 12, 0),
        (lambda x: jnp.fft.rfft(x), (f32(2, 16),), 2 * 2 * 16 * 4, 0),
        (lambda x: jnp.fft.irfft(x, n=16), (jax.ShapeDtypeStruct((2, 9), jnp.complex64),), 256, 0),
        (lambda z: z * z, (jax.ShapeDtypeStruct((7,), jnp.complex64),), 42, 0),
        (lambda x: jnp.where(x > 0, x, x[::-1]), (f32(4),), 0, 0),
    ],
)
def test_count_by_hand(function, args, vector, matrix):
    work = roofline.count(function, *args)
    assert (work.vector, work.matrix) == (vector, matrix)
    outputs = jax.eval_shape(function, *args)
    moved = sum(a.size * a.dtype.itemsize for a in (*args, *jax.tree.leaves(outputs)))
    assert work.bytes == moved


def test_count_takes_the_dearest_branch_and_refuses_open_loops():
    def branch(x):
        return jax.lax.cond(x[0] > 0, lambda x: x * x * x, lambda x: x, x)

    assert roofline.count(branch, f32(4)).vector == 8
    with pytest.raises(NotImplementedError, match="while"):
        roofline.count(lambda x: jax.lax.while_loop(lambda c: c[0] < 1, lambda c: c + 1, x), f32(4))


def test_count_enters_custom_derivatives():
    @jax.custom_vjp
    def triple(x):
        return x + x + x

    triple.defvjp(lambda x: (triple(x), None), lambda _, g: (g * 3.0,))
    assert roofline.count(triple, f32(4)).vector == 8
    assert roofline.count(jax.grad(lambda x: jnp.sum(triple(x))), f32(4)).vector >= 12


def test_least_time_names_the_bound():
    peak = roofline.DEVICES["tpu-v5e"]
    work = roofline.Work(vector=peak.vector, matrix=0.5 * peak.matrix, bytes=0.25 * peak.bandwidth)
    assert roofline.least_time(work, "tpu-v5e") == (1.0, "vector")
    only = roofline.Work(0.0, peak.matrix * 2, 0.0)
    assert roofline.least_time(only, "tpu-v5e") == (2.0, "matrix")
    # A GPU runs float32 products on the same units: the times add up.
    peak = roofline.DEVICES["h200"]
    work = roofline.Work(vector=peak.vector, matrix=0.5 * peak.matrix, bytes=0.25 * peak.bandwidth)
    assert roofline.least_time(work, "h200") == (1.5, "compute")
    with pytest.raises(ValueError, match=r"device must be one of .*h200"):
        roofline.least_time(work, "h20")


@pytest.mark.parametrize("length", [16, 33])
def test_every_form_of_the_dplr_kernel_agrees_with_the_definition(length):
    problem = peers.s4_problem(3, 8, length, seed=1)
    definition = peers.power_iteration(peers.power_operands(problem, "float64"), length=length)
    params = peers.cast(problem, "float64")
    scale = np.abs(definition).max()
    np.testing.assert_allclose(
        peers.dplr_broadcast(params, length=length), definition, atol=1e-12 * scale
    )
    np.testing.assert_allclose(
        peers.dplr_fused(params, length=length), definition, atol=1e-12 * scale
    )


def test_power_iteration_is_the_impulse_response_of_scipy():
    problem = peers.s4_problem(2, 4, 32)
    operands = peers.power_operands(problem, "float64")
    kernel = peers.power_iteration(operands, length=32)
    for head in range(2):
        bar_a, bar_b, c = (np.asarray(operands[name][head]) for name in ("bar_a", "bar_b", "c"))
        system = (bar_a, bar_b[:, None], c[None], np.zeros((1, 1)), 1.0)
        _, (response,) = scipy.signal.dimpulse(system, n=33)
        # SciPy's state is read before the update: its response lags by one.
        np.testing.assert_allclose(kernel[head], response[1:, 0], atol=1e-13)


@pytest.mark.parametrize("length", [17, 256])
def test_vandermonde_forms_agree_with_the_geometric_sum(length):
    problem = peers.s4_problem(3, 8, length, derive_c_tilde=False)
    params = peers.vandermonde_operands(problem, "float64")
    lam = -np.asarray(params["alpha"]) + 1j * np.asarray(params["beta"])
    v = np.asarray(params["v_re"]) + 1j * np.asarray(params["v_im"])
    powers = np.exp(lam[..., None] * np.arange(length))
    wanted = 2 * np.einsum("hm,hml->hl", v, powers).real
    atol = tol("float64", length) * np.abs(wanted).max()
    for form in (peers.vandermonde_direct, peers.vandermonde_two_level):
        np.testing.assert_allclose(form(params, length=length), wanted, atol=atol)


def test_rtf_is_the_folded_impulse_response_of_its_filter():
    params = peers.rtf_problem(2, 4, dtype="float64")
    kernel = peers.rtf(params, length=256)
    impulse = np.eye(1, 256)[0]
    for head in range(2):
        b, a = np.asarray(params["b"][head]), np.asarray(params["a"][head])
        response = scipy.signal.lfilter(b, [1, *a], impulse)
        np.testing.assert_allclose(kernel[head], response, atol=1e-12)


def test_problem_rejects():
    with pytest.raises(ValueError, match="state must be even"):
        peers.s4_problem(1, 5, 8)
    with pytest.raises(ValueError, match="heads"):
        peers.s4_problem(0, 4, 8)


@pytest.mark.x32
def test_counted_work_of_the_dplr_kernel_is_near_the_card():
    # The card: about 60 operations per (mode, node), N L / 4 of them, plus the transform.
    sizes = bench_ssm.Sizes(heads=2, state=64, length=1024, vandermonde_length=1024)
    work = bench_ssm.kernel_work(sizes)
    pairs = sizes.heads * sizes.state * sizes.length / 4
    assert 20 * pairs < work["DPLR forward"].flops < 90 * pairs
    assert work["DPLR forward+vjp"].flops > 2 * work["DPLR forward"].flops
    # Exponentials over two levels and a product of [L/T, 2M] by [2M, T].
    product = 4 * sizes.heads * sizes.state * sizes.length / 2
    assert work["Vandermonde forward"].matrix == pytest.approx(product, rel=0.2)


@pytest.mark.slow
@pytest.mark.x32
def test_bench_prints_and_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "bench.json"
    # Optax's bias correction raises a float to an integer power.
    with jax.numpy_dtype_promotion("standard"):
        assert bench_ssm.main(["--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "jaxkit bench ssm" in printed
    record = json.loads(out.read_text())
    names = [line["name"] for line in record["lines"]]
    for part in ("DPLR forward,", "DPLR forward+vjp,", "temporaries", "Vandermonde", "slope"):
        assert any(part in name for name in names), part
    assert all(line["met"] is None for line in record["lines"])  # small sizes are not judged
    assert all(np.isfinite(line["value"]) for line in record["lines"])
    assert record["environment"]["versions"]["jax"] == jax.__version__
    assert {row["kernel"] for row in record["roofline"]} == set(
        bench_ssm.kernel_work(bench_ssm.QUICK)
    )
    differences = [line["value"] for line in record["lines"] if "difference" in line["name"]]
    assert len(differences) == 2
    assert max(differences) < 1e-3, differences


def test_targets_are_judged_both_ways():
    line = bench.Line("ratio", 5.9, "x", least=6.0)
    assert line.met is False
    assert bench.Line("slope", 1.1, "", most=1.15).met is True
    assert bench.Line("plain", 1.0, "").met is None
    console = Console(file=io.StringIO(), width=200)
    bench.show("ssm", console, [line], [], "here")
    assert " no " in console.file.getvalue()


def test_bench_rejects_unknown_parts(capsys):
    with pytest.raises(SystemExit):
        bench_ssm.main(["--parts", "dplrr"])
    assert "dplrr" in capsys.readouterr().err
