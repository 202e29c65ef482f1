"""`jaxkit bench vq`: the forms that it times, what it counts, and what it prints and writes."""

import dataclasses
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxkit_experiments import cli
from jaxkit_experiments.speed import measure, public_vq, vq

from jaxkit.attention.vq import VQAttention
from tests.tolerance import tol

TINY = vq.QUICK


def unit(x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * x.shape[-1] ** -0.25


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def numpy_layer(params, x, codebook):
    """The layer of `layer_problem` in float64, dense if there is no codebook."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(x, np.float64)[0]
    normed = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    silu = lambda y: y / (1 + np.exp(-y))
    q, k = unit(normed @ p["q"]), unit(normed @ p["k"])
    if codebook is not None:
        codes = np.asarray(codebook, np.float64)[0]
        k = codes[((k[:, None] - codes[None]) ** 2).sum(-1).argmin(-1)]
    scores = np.where(np.tril(np.ones((len(x), len(x)), bool)), q @ k.T, -np.inf)
    out = softmax(scores) @ silu(normed @ p["v"])
    return x + (out * silu(normed @ p["gate"])) @ p["out"]


@pytest.mark.x32
def test_all_three_forms_are_the_layer_that_they_say():
    params, x, cotangent = vq.layer_problem(TINY, 64)
    for name, core in vq.cores(TINY).items():
        out, (grad_params, grad_x) = jax.jit(vq.forward_backward(core))(params, x, cotangent)
        codebook = None if name == "dot_product" else vq.layer_codebook(TINY)
        wanted = numpy_layer(params, x, codebook)
        np.testing.assert_allclose(out[0], wanted, atol=tol("float32", 64) * np.abs(wanted).max())
        assert grad_x.shape == x.shape
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grad_params)), name


@pytest.mark.x32
def test_dense_attention_takes_values_wider_than_keys():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 9, d)).astype(np.float32) for d in (4, 4, 7))
    scores = np.where(np.tril(np.ones((9, 9), bool)), q @ np.swapaxes(k, -1, -2), -np.inf)
    np.testing.assert_allclose(
        vq.dense(*map(jnp.asarray, (q, k, v))), softmax(scores) @ v, atol=1e-5
    )


@pytest.mark.x32
def test_both_searches_find_the_nearest_code():
    rng = np.random.default_rng(0)
    x, codebook = rng.standard_normal((50, 6)), rng.standard_normal((17, 6))
    nearest = ((x[:, None] - codebook[None]) ** 2).sum(-1).argmin(-1)
    arguments = jnp.asarray(x, jnp.float32), jnp.asarray(codebook, jnp.float32)
    np.testing.assert_array_equal(vq.unfused_search(*arguments), nearest)
    np.testing.assert_array_equal(vq.fused_search(*arguments), nearest)
    assert vq.wrong_indices(x, codebook, nearest) == 0
    planted = nearest.copy()
    planted[[3, 30]] = (planted[[3, 30]] + 1) % 17
    assert vq.wrong_indices(x, codebook, planted) == 2
    with pytest.raises(ValueError, match="index must lie within"):
        vq.wrong_indices(x, codebook, np.full(50, 17))


@pytest.mark.x32
def test_a_decoded_token_is_that_of_the_whole_sequence():
    position = TINY.positions[1]
    state, (q, k, v) = vq.decode_problem(TINY, position)
    assert int(state.position) == position
    counts = np.asarray(state.cache.counts)
    assert counts.sum() == position - (TINY.block_length + 1)  # the rest is in the window
    before, _ = vq.decode_problem(dataclasses.replace(TINY, positions=(1,)), position)
    np.testing.assert_array_equal(before.codes, state.codes)  # the same problem every time
    out, after = jax.jit(vq.step)(state, q[0], k[0], v[0], vq.layer_codebook(TINY))
    assert out.shape == (1, 1, TINY.value_dim)
    assert int(after.position) == position + 1


def test_available_memory_is_what_the_machine_may_still_give():
    room = measure.available_memory()
    assert room is not None
    assert 1e6 < room < 1e14


@pytest.mark.x32
def test_a_form_that_does_not_fit_is_not_run_and_says_so(monkeypatch):
    monkeypatch.setattr(measure, "available_memory", lambda: 1000)
    lines, record = vq.attention(dataclasses.replace(TINY, lengths=(64,), targets=(4.0,)))
    against = [line for line in lines if "against" in line.name]
    assert len(against) == 2
    for line in against:
        assert line.value == math.inf
        assert line.met
        assert "does not fit" in line.detail
    assert set(record["64"]["timings"]) == {"block"}


@pytest.mark.x32
@pytest.mark.parametrize(("temp", "runs"), [(700, True), (900, False), (2000, False)])
def test_what_fits_is_decided_by_scratch_too_and_leaves_a_fifth(monkeypatch, temp, runs):
    plan = measure.Memory(temp=temp, arguments=50, outputs=0, peak=60)
    monkeypatch.setattr(measure, "measure_memory", lambda *_: plan)
    monkeypatch.setattr(measure, "available_memory", lambda: 1000)
    _, record = vq.attention(dataclasses.replace(TINY, lengths=(32,), targets=(4.0,)))
    assert ("quadratic" in record["32"]["timings"]) == runs


@pytest.mark.x32
def test_counted_work_is_that_of_the_card():
    sizes = vq.Sizes(
        block_length=512, codes=512, key_dim=128, value_dim=1536, lengths=(2048,), tokens=64
    )
    work = vq.kernel_work(sizes)
    # Card, check 8: (S + 2 L)(dk + dv) products a token at these sizes.
    assert work["vq_attention forward"].matrix / 2 / 2048 == 2_555_904
    # The scores again, and four more products of their size.
    backward = work["vq_attention forward+vjp"].matrix - work["vq_attention forward"].matrix
    products = 2048 * (512 + 1024)
    assert backward / 2 == pytest.approx(products * (3 * 128 + 2 * 1536), rel=0.01)
    assert work["vq_attention decode"].matrix / 2 == (512 + 513) * (128 + 1536)
    search = sizes.tokens * sizes.codebook * sizes.code_dim
    assert work["nearest_code"].matrix / 2 == pytest.approx(search, rel=1.01)
    # The search moves its vectors, its codes and one index each.
    moved = 4 * (sizes.tokens * (sizes.code_dim + 1) + sizes.codebook * sizes.code_dim)
    assert work["nearest_code"].bytes == moved


def public_parameters(rng, dim, key_dim, codes):
    """Parameters in the layout of the public layer, none of them zero."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)
    return {
        "input_ln": {"g": 1 + normal(dim), "b": normal(dim)},
        "q_proj": {"kernel": normal(dim, key_dim)},
        "kvg_proj": {"kernel": normal(dim, key_dim + 4 * dim)},
        "r_proj": {"kernel": normal(dim, key_dim)},
        "res_proj": {"kernel": normal(2 * dim, dim)},
        "u": 3 * normal(key_dim),
        "v": 3 * normal(key_dim),
        "quantizer": {
            "c_sum": 1.5 * normal(1, codes, key_dim),
            "c_count": jnp.full((1, codes), 1.5, jnp.float32),
        },
    }


def public_definition(params, x, block_length):
    """What the public layer adds to its input, by its own definition with all scores, float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    length, dim = x.shape
    key_dim = p["q_proj"]["kernel"].shape[1]
    normed = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    normed = normed * p["input_ln"]["g"] + p["input_ln"]["b"]
    silu = lambda y: y / (1 + np.exp(-y))
    k, v, gate = np.split(normed @ p["kvg_proj"]["kernel"], [key_dim, key_dim + 2 * dim], axis=1)
    q, k, v, gate = unit(normed @ p["q_proj"]["kernel"]), unit(k), silu(v), silu(gate)
    codes = p["quantizer"]["c_sum"][0] / p["quantizer"]["c_count"][0][:, None]
    k = codes[((k[:, None] - codes[None]) ** 2).sum(-1).argmin(-1)]
    scale = key_dim**-0.25
    phase = np.arange(block_length + 1)[:, None] * 1e5 ** (-np.arange(0, dim, 2) / dim)
    r = np.concatenate([np.sin(phase), np.cos(phase)], -1) @ p["r_proj"]["kernel"] * scale
    lag = np.arange(length)[:, None] - np.arange(length)[None]
    by_lag = np.take_along_axis((q + scale * p["v"]) @ r.T, np.clip(lag, 0, block_length), axis=1)
    scores = (q + scale * p["u"]) @ k.T + np.where(lag <= block_length, by_lag, 0.0)
    out = softmax(np.where(lag >= 0, scores, -np.inf)) @ v
    return (out * gate) @ p["res_proj"]["kernel"]


@pytest.mark.x32
def test_our_layer_with_the_public_weights_is_the_public_layer():
    rng = np.random.default_rng(0)
    params = public_parameters(rng, 8, 4, 6)
    layer = VQAttention(8, key_dim=4, num_codes=6, block_length=4, rngs=nnx.Rngs(0))
    vq.take_weights(layer, params)
    x = rng.standard_normal((14, 8))
    wanted = public_definition(params, x, 4)
    out = nnx.jit(lambda layer, x: layer(x))(layer, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.x32
def test_the_public_code_itself_where_there_is_a_checkout():
    checkout = os.environ.get("JAXKIT_TRANSFORMER_VQ")
    if not checkout:
        pytest.skip("JAXKIT_TRANSFORMER_VQ names no checkout of the public transformer-vq code")
    lines, record = vq.against_public(TINY, Path(checkout))
    assert "skipped" not in record, record
    (difference,) = [line for line in lines if "difference" in line.name]
    assert difference.value < 1e-5


def write_package(folder, attn):
    package = folder / "src" / "transformer_vq" / "nn"
    package.mkdir(parents=True)
    for where in (package.parent, package):
        (where / "__init__.py").write_text("")
    for name in ("grad", "types", "norm", "pe", "vq"):
        (package / f"{name}.py").write_text("")
    (package / "attn.py").write_text(attn)


def test_the_public_layer_is_skipped_with_a_reason(tmp_path):
    assert "no checkout" in vq.against_public(TINY, None)[1]["skipped"]
    lines, record = vq.against_public(TINY, tmp_path)
    assert not lines
    assert "it must be a checkout of branch main" in record["skipped"]
    write_package(tmp_path / "old", "import jax.no_longer_there\n")
    lines, record = vq.against_public(TINY, tmp_path / "old")
    assert not lines
    assert "does not import: ModuleNotFoundError" in record["skipped"]


def test_public_modules_get_the_old_clip_and_leave_no_trace(tmp_path):
    import sys

    code = "import jax.numpy as jnp\ndef f(x):\n    return jnp.clip(x, a_min=1.0) + jnp.ones(2)\n"
    write_package(tmp_path, code)
    path = list(sys.path)
    modules = public_vq._load(tmp_path)
    np.testing.assert_array_equal(modules.attn.f(jnp.array([0.0, 3.0])), [2.0, 4.0])
    assert sys.path == path
    assert not any(name.startswith("transformer_vq") for name in sys.modules)


@pytest.mark.slow
@pytest.mark.x32
def test_bench_prints_and_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "vq.json"
    assert vq.main(["--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "jaxkit bench vq" in printed
    assert "public transformer-vq layer: skipped, no checkout" in printed
    record = json.loads(out.read_text())
    names = [line["name"] for line in record["lines"]]
    for part in ("against quadratic", "against dot_product", "slope", "decode", "nearest_code"):
        assert any(part in name for name in names), part
    assert all(line["met"] is None for line in record["lines"])  # small sizes are not judged
    assert all(np.isfinite(line["value"]) for line in record["lines"])
    differences = [line["value"] for line in record["lines"] if "difference" in line["name"]]
    assert len(differences) == len(TINY.lengths)
    assert max(differences) < 5e-6
    kernels = {row["kernel"]: row for row in record["roofline"]}
    assert set(kernels) == set(vq.kernel_work(TINY))
    for row in kernels.values():
        assert row["tpu-v5e"]["seconds"] > 0
        assert row["h200"]["seconds"] > 0


def test_the_command_line_knows_the_benchmark():
    assert "vq" in cli._benchmarks()
    assert "public_vq" not in cli._benchmarks()


def test_targets_are_those_of_the_issue():
    assert (vq.FULL.lengths, vq.FULL.targets) == ((8192, 32768), (4.0, 12.0))
    assert (vq.FULL.block_length, vq.FULL.codes) == (256, 256)
    assert (vq.FULL.key_dim, vq.FULL.value_dim) == (64, 128)
    assert (vq.FULL.tokens, vq.FULL.codebook, vq.FULL.code_dim) == (65536, 8192, 64)
    assert (min(vq.FULL.slope_lengths), max(vq.FULL.slope_lengths)) == (2048, 65536)
    assert (min(vq.FULL.positions), max(vq.FULL.positions)) == (1024, 65536)


def test_bench_rejects_unknown_parts(capsys):
    with pytest.raises(SystemExit):
        vq.main(["--parts", "atention"])
    assert "atention" in capsys.readouterr().err
