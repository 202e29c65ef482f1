"""`jaxkit bench vq`: attention over vector-quantised keys against dense attention and the device.

Six parts, all in one process: time of a layer in block form against quadratic forms, its slope in
the length, time per decoded token against the position, the code search against matmul + argmin,
the public transformer-vq code's layer (`--public PATH`), and rooflines. A target is judged only at
the size it is stated for.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxkit_kernels as kernels
import numpy as np
from flax import nnx
from jaxkit_kernels.nearest_code import nearest_code
from rich.console import Console

from jaxkit.attention.vq import (
    VQAttention,
    VQState,
    init_state,
    prefill,
    quadratic_attention,
    step,
    vq_attention,
)
from jaxkit.quantize import EMAState
from jaxkit_experiments.speed import measure, roofline
from jaxkit_experiments.speed.bench import Line, Part, command, milliseconds, roofline_rows, run
from jaxkit_experiments.speed.public_vq import PublicLayer, Unavailable

__all__ = ["Sizes", "bench", "main"]


@dataclass(frozen=True)
class Sizes:
    """Problem sizes of one run of the benchmark.

    Example:
        >>> FULL.block_length, QUICK.judged
        (256, False)
    """

    block_length: int = 256
    codes: int = 256
    key_dim: int = 64
    value_dim: int = 128
    lengths: tuple[int, ...] = (8192, 32768)
    targets: tuple[float, ...] = (4.0, 12.0)
    """At least so many times faster than the quadratic forms, one for each of `lengths`."""
    slope_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    positions: tuple[int, ...] = (1024, 4096, 16384, 65536)
    decoded: int = 256
    tokens: int = 65536
    codebook: int = 8192
    code_dim: int = 64
    public_length: int = 4096
    public_model_dim: int = 128
    repeats: int = 9
    budget: float = 40.0
    judged: bool = True
    """Whether these are the sizes that the targets are stated for."""


FULL = Sizes()
QUICK = Sizes(
    block_length=16,
    codes=16,
    key_dim=8,
    value_dim=16,
    lengths=(64, 128),
    slope_lengths=(64, 128, 256),
    positions=(32, 64),
    decoded=16,
    tokens=256,
    codebook=64,
    code_dim=8,
    public_length=64,
    public_model_dim=16,
    repeats=3,
    budget=2.0,
    judged=False,
)

Core = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _unit(x: Any) -> Any:
    """Root mean square 1 over the last axis, then d^(-1/4): the layer's queries and keys."""
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * scale * x.shape[-1] ** -0.25


def layer_problem(sizes: Sizes, length: int) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Parameters of one gated single-head layer of width dv/2, its input and a cotangent."""
    width = sizes.value_dim // 2
    shapes = {
        "q": (width, sizes.key_dim),
        "k": (width, sizes.key_dim),
        "v": (width, sizes.value_dim),
        "gate": (width, sizes.value_dim),
        "out": (sizes.value_dim, width),
    }
    params = {
        name: jnp.asarray(_random(shape, seed)) * shape[0] ** -0.5
        for seed, (name, shape) in enumerate(shapes.items())
    }
    x = jnp.asarray(_random((1, length, width), 10))
    return params, x, jnp.asarray(_random((1, length, width), 11))


def layer_codebook(sizes: Sizes) -> jax.Array:
    """Random keys as codes, `[1, S, dk]`."""
    return _unit(jnp.asarray(_random((1, sizes.codes, sizes.key_dim), 12)))


def layer(core: Core, params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """x + (o ∘ gate) W_o with o = core(q, k, v); heads are the axis before the length."""
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    q, k = _unit(normed @ params["q"]), _unit(normed @ params["k"])
    v, gate = jax.nn.silu(normed @ params["v"]), jax.nn.silu(normed @ params["gate"])
    out = core(q[:, None], k[:, None], v[:, None])[:, 0]
    return x + (out * gate) @ params["out"]


def forward_backward(core: Core) -> Callable[..., Any]:
    """The layer's output and its gradient in parameters and input."""

    def both(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        out, pull = jax.vjp(partial(layer, core), params, x)
        return out, pull(cotangent)

    return both


def dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`jax.nn.dot_product_attention` on the keys as they are.

    It wants one width for keys and values: zeros, which change no score, fill the smaller one.
    """
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    width = max(key_dim, value_dim)
    q, k, v = (
        jnp.pad(jnp.moveaxis(a, 1, 2), ((0, 0), (0, 0), (0, 0), (0, width - a.shape[-1])))
        for a in (q, k, v)
    )
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    return jnp.moveaxis(out, 2, 1)[..., :value_dim]


def cores(sizes: Sizes) -> dict[str, Core]:
    """The block form, this project's quadratic definition, and JAX's dense attention."""
    codebook = layer_codebook(sizes)

    def block(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return vq_attention(q, k, v, codebook, block_length=sizes.block_length)

    def quadratic(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return quadratic_attention(q, k, v, codebook)

    return {"block": block, "quadratic": quadratic, "dot_product": dense}


def _needed(plan: measure.Memory) -> int:
    """Bytes at once: what some plans call their peak leaves out the scratch."""
    return max(plan.peak, plan.temp + plan.arguments)


def _once(name: str, call: Callable[[], Any]) -> measure.Timing:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return measure.Timing(name, (time.perf_counter() - start,))


def attention(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """The layer in block form against both quadratic forms, forward and backward."""
    lines: list[Line] = []
    record: dict[str, Any] = {}
    forms = {name: forward_backward(core) for name, core in cores(sizes).items()}
    for length, target in zip(sizes.lengths, sizes.targets, strict=True):
        problem = layer_problem(sizes, length)
        plans = {name: measure.measure_memory(form, *problem) for name, form in forms.items()}
        room = measure.available_memory()
        fitting = {}
        for name, form in forms.items():
            plan = plans[name]
            # A fifth is left to others: a machine that swaps times its disk.
            if name == "block" or plan is None or room is None or _needed(plan) <= 0.8 * room:
                # Compiled ahead, so that the first call is like any other.
                fitting[name] = partial(jax.jit(form).lower(*problem).compile(), *problem)
        # A quadratic form takes a minute at the longest length: then one call of each must do.
        long = length > 16384
        if long:
            timings = {name: _once(name, call) for name, call in fitting.items()}
        else:
            rounds = max(3, sizes.repeats // 3)
            timings = measure.compare(fitting, repeats=rounds, budget=sizes.budget)
        record[str(length)] = {"timings": timings, "plans": plans, "available": room}
        size = f"T={length} L=S={sizes.block_length} dk={sizes.key_dim} dv={sizes.value_dim}"
        for name in ("quadratic", "dot_product"):
            plan = plans[name]
            memory = "" if plan is None else f"; temporaries {plan.temp / 1e6:.0f} MB"
            if name in timings:
                ratio = measure.speedup(timings[name], timings["block"])
                detail = milliseconds({each: timings[each] for each in (name, "block")}) + memory
            else:
                assert plan is not None
                assert room is not None
                ratio = math.inf
                detail = (
                    f"does not fit: {_needed(plan) / 1e9:.1f} GB, {room / 1e9:.1f} GB available"
                )
            lines.append(
                Line(f"layer fwd+bwd against {name}, {size}", ratio, "x", detail, least=target)
            )
        plan = plans["block"]
        if plan is not None:
            lines.append(Line(f"block form temporaries, T={length}", plan.temp / 1e6, "MB"))
        if "quadratic" in fitting and not long:
            one, other = (np.asarray(fitting[name]()[0]) for name in ("block", "quadratic"))
            difference = float(np.max(np.abs(one - other)) / np.max(np.abs(other)))
            lines.append(
                Line("block and quadratic form, largest difference", difference, "", most=5e-6)
            )
    return lines, record


def slope(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """Seconds of the layer in block form, forward and backward, against the length."""
    both = jax.jit(forward_backward(cores(sizes)["block"]))
    calls = {
        str(length): partial(both, *layer_problem(sizes, length)) for length in sizes.slope_lengths
    }
    timings = measure.compare(calls, repeats=max(3, sizes.repeats // 2 + 1), budget=sizes.budget)
    exponent = measure.fit_slope(
        sizes.slope_lengths, [timings[str(length)].median for length in sizes.slope_lengths]
    )
    line = Line(
        f"layer fwd+bwd, slope of log time in log T, L=S={sizes.block_length}",
        exponent,
        "",
        milliseconds({f"T={name}": timing for name, timing in timings.items()}),
        most=1.15,
    )
    return [line], {"lengths": list(sizes.slope_lengths), "slope": exponent, **timings}


# --- the code search ---------------------------------------------------------------------------


def unfused_search(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the nearest code from the whole matrix of distances (less ‖x‖²) and an argmin."""
    product = jnp.dot(x, codebook.T, precision="highest")
    norms = jnp.sum(codebook * codebook, axis=-1)
    return jnp.argmin(norms[None] - 2 * product, axis=-1)


def fused_search(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the nearest code by `nearest_code`."""
    return nearest_code(x, codebook).index


def wrong_indices(x: np.ndarray, codebook: np.ndarray, index: np.ndarray) -> int:
    """How many codes are not the nearest by more than float32 rounding, in float64."""
    x, codebook = np.asarray(x, np.float64), np.asarray(codebook, np.float64)
    norms = np.sum(codebook**2, -1)
    wrong = 0
    for start in range(0, len(x), 4096):
        part, chosen = x[start : start + 4096], index[start : start + 4096]
        if np.any((chosen < 0) | (chosen >= len(codebook))):
            raise ValueError("index must lie within the codebook.")
        scores = norms - 2 * part @ codebook.T
        gap = np.take_along_axis(scores, chosen[:, None], -1)[:, 0] - scores.min(-1)
        size = np.abs(scores).max(-1)
        wrong += int(np.sum(gap > 1e-5 * size))
    return wrong


def search(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """`nearest_code` against matmul + argmin: time, temporaries, indices."""
    x = jnp.asarray(_random((sizes.tokens, sizes.code_dim), 0))
    codebook = jnp.asarray(_random((sizes.codebook, sizes.code_dim), 1))
    forms = {"unfused": jax.jit(unfused_search), "nearest_code": jax.jit(fused_search)}
    found = {name: np.asarray(form(x, codebook)) for name, form in forms.items()}
    differing = int(np.sum(found["unfused"] != found["nearest_code"]))
    wrong = wrong_indices(np.asarray(x), np.asarray(codebook), found["nearest_code"])
    timings = measure.compare(
        {name: partial(form, x, codebook) for name, form in forms.items()},
        repeats=sizes.repeats,
        budget=sizes.budget,
    )
    size = f"T={sizes.tokens} K={sizes.codebook} d={sizes.code_dim}"
    matrix = sizes.tokens * sizes.codebook * 4
    lines = [
        Line(
            f"nearest_code against matmul + argmin, {size}",
            measure.speedup(timings["unfused"], timings["nearest_code"]),
            "x",
            milliseconds(timings),
            least=1.0,
        ),
        Line(
            "nearest_code, indices that differ from matmul + argmin",
            differing,
            "",
            f"of {sizes.tokens}; {wrong} farther than the nearest beyond rounding, in float64",
            most=0,
        ),
    ]
    plans = {name: measure.measure_memory(form, x, codebook) for name, form in forms.items()}
    for name, plan in plans.items():
        if plan is not None:
            lines.append(
                Line(
                    f"{name} temporaries",
                    plan.temp / 1e6,
                    "MB",
                    f"{plan.temp / matrix:.4f} of the T x K matrix",
                    most=matrix / 16e6 if name == "nearest_code" else None,
                )
            )
    return lines, {"timings": timings, "plans": plans, "differing": differing, "wrong": wrong}


# --- decoding ----------------------------------------------------------------------------------


def decode_problem(
    sizes: Sizes, position: int
) -> tuple[VQState, tuple[jax.Array, jax.Array, jax.Array]]:
    """The state after `position` tokens, and q, k, v `[tokens, batch, heads, dim]` to come."""
    codebook = layer_codebook(sizes)

    def tokens(count: int, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys, values = (1, 1, count, sizes.key_dim), (1, 1, count, sizes.value_dim)
        q, k = (_unit(jnp.asarray(_random(keys, seed + i))) for i in range(2))
        return q, k, jnp.asarray(_random(values, seed + 2))

    empty = init_state(1, 1, sizes.codes, sizes.value_dim, window=sizes.block_length)
    fill = jax.jit(partial(prefill, block_length=sizes.block_length))
    _, state = fill(empty, *tokens(position, 20), codebook)
    q, k, v = (jnp.moveaxis(x, 2, 0) for x in tokens(sizes.decoded, 30))
    return state, (q, k, v)


def decode(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """Seconds per decoded token at several positions; dense attention's for comparison."""
    codebook = layer_codebook(sizes)

    @jax.jit
    def several(state: VQState, tokens: Any) -> Any:
        def body(state: VQState, token: Any) -> Any:
            q, k, v = token
            out, state = step(state, q, k, v, codebook)
            return state, out

        return jax.lax.scan(body, state, tokens)

    @jax.jit
    def dense_several(keys: jax.Array, values: jax.Array, queries: jax.Array) -> jax.Array:
        # Without the write into the cache, which a donated buffer makes free.
        def body(_: None, q: jax.Array) -> Any:
            weights = jax.nn.softmax(q @ keys.T)
            return None, weights @ values

        return jax.lax.scan(body, None, queries)[1]

    calls, dense_calls = {}, {}
    for position in sizes.positions:
        state, tokens = decode_problem(sizes, position)
        calls[str(position)] = partial(several, state, tokens)
        keys = _unit(jnp.asarray(_random((position, sizes.key_dim), 40)))
        values = jnp.asarray(_random((position, sizes.value_dim), 41))
        dense_calls[str(position)] = partial(dense_several, keys, values, tokens[0][:, 0, 0])
    # Ten percent are to be seen: many short rounds.
    timings = measure.compare(calls, repeats=5 * sizes.repeats, budget=sizes.budget)
    dense_timings = measure.compare(dense_calls, repeats=3, budget=sizes.budget)

    first = str(sizes.positions[0])
    ratios = [measure.speedup(timings[name], timings[first]) for name in calls]
    shown = lambda of: ", ".join(
        f"{name}: {timing.median / sizes.decoded * 1e6:.3g} µs" for name, timing in of.items()
    )
    lines = [
        Line(
            f"decode, slowest position over fastest, L=S={sizes.block_length}",
            max(ratios) / min(ratios),
            "x",
            f"per token at {shown(timings)}",
            most=1.10,
        ),
        Line(
            "dense attention over a key-value cache, last position over first",
            dense_timings[str(sizes.positions[-1])].median / dense_timings[first].median,
            "x",
            f"per token at {shown(dense_timings)}",
        ),
    ]
    return lines, {"vq": timings, "dense": dense_timings}


# --- the public code ---------------------------------------------------------------------------


def layer_pair(sizes: Sizes, checkout: Path) -> tuple[PublicLayer, Any, VQAttention]:
    """The public layer with its parameters, and ours with the same weights."""
    theirs = PublicLayer(
        checkout,
        model_dim=sizes.public_model_dim,
        key_dim=sizes.key_dim,
        value_dim=2 * sizes.public_model_dim,
        block_length=sizes.block_length,
        num_codes=sizes.codes,
    )
    params = jax.tree.map(lambda leaf: leaf, dict(theirs.init(jax.random.key(0))))
    # What starts at zero or one would hide a wrong place.
    for seed, name in enumerate(("u", "v")):
        params[name] = jnp.asarray(_random(params[name].shape, 50 + seed))
    params["input_ln"] = {
        name: 1 + 0.1 * jnp.asarray(_random(leaf.shape, 52 + seed))
        for seed, (name, leaf) in enumerate(sorted(params["input_ln"].items()))
    }
    params["quantizer"] = {
        "c_sum": 1.5 * layer_codebook(sizes),
        "c_count": jnp.full((1, sizes.codes), 1.5),
    }
    ours = VQAttention(
        sizes.public_model_dim,
        key_dim=sizes.key_dim,
        num_codes=sizes.codes,
        block_length=sizes.block_length,
        bias="xl",
        wavelength=1e5,
        rngs=nnx.Rngs(0),
    )
    take_weights(ours, params)
    return theirs, params, ours


def take_weights(layer: VQAttention, params: Mapping[str, Any]) -> None:
    """Put the public layer's parameters (one head) into one of ours."""
    key_dim, value_dim = layer.key_dim, layer.value_dim
    key, value, gate = jnp.split(
        params["kvg_proj"]["kernel"], [key_dim, key_dim + value_dim], axis=1
    )
    for linear, kernel in (
        (layer.query, params["q_proj"]["kernel"]),
        (layer.key, key),
        (layer.value, value),
        (layer.gate, gate),
        (layer.relative, params["r_proj"]["kernel"]),
        (layer.out, params["res_proj"]["kernel"]),
    ):
        linear.kernel[...] = kernel
    layer.norm_gain[...], layer.norm_bias[...] = params["input_ln"]["g"], params["input_ln"]["b"]
    layer.u[...], layer.w[...] = params["u"][None], params["v"][None]
    quantizer = params["quantizer"]
    layer.set_codebook_state(EMAState(quantizer["c_sum"], quantizer["c_count"]))


def against_public(sizes: Sizes, checkout: Path | None) -> tuple[list[Line], dict[str, Any]]:
    """Our layer and the public one: same weights, same outputs, time side by side."""
    if checkout is None:
        return [], {"skipped": "no checkout was given (--public PATH)"}
    try:
        theirs, params, ours = layer_pair(sizes, checkout)
    except Unavailable as error:
        return [], {"skipped": str(error)}
    graph, values = nnx.split(ours)
    shape = 1, sizes.public_length, sizes.public_model_dim
    x, cotangent = jnp.asarray(_random(shape, 60)), jnp.asarray(_random(shape, 61))

    def our_form(values: Any, x: jax.Array) -> jax.Array:
        return x + nnx.merge(graph, values)(x)

    def both(form: Callable[..., jax.Array]) -> Callable[..., Any]:
        def run(weights: Any, x: jax.Array, cotangent: jax.Array) -> Any:
            out, pull = jax.vjp(form, weights, x)
            return out, pull(cotangent)

        return jax.jit(run)

    forms: dict[str, tuple[Callable[..., jax.Array], Any]] = {
        "public": (theirs, params),
        "ours": (our_form, values),
    }
    forward = {n: partial(jax.jit(form), weights, x) for n, (form, weights) in forms.items()}
    backward = {
        name: partial(both(form), weights, x, cotangent) for name, (form, weights) in forms.items()
    }
    outputs = {name: np.asarray(call()) for name, call in forward.items()}
    races = {
        "forward": measure.compare(forward, repeats=sizes.repeats, budget=sizes.budget),
        "forward+vjp": measure.compare(backward, repeats=sizes.repeats, budget=sizes.budget),
    }
    # What the attention adds is compared: x would hide it.
    added = {name: np.asarray(out, np.float64) - np.asarray(x) for name, out in outputs.items()}
    difference = np.max(np.abs(added["ours"] - added["public"])) / np.max(np.abs(added["public"]))
    size = f"T={sizes.public_length} L=S={sizes.block_length} dim={sizes.public_model_dim}"
    lines = [
        Line(
            f"public layer against ours, {part}, {size}",
            measure.speedup(race["public"], race["ours"]),
            "x",
            milliseconds(race),
        )
        for part, race in races.items()
    ]
    lines.append(
        Line(
            "public layer and ours, largest difference",
            float(difference),
            "",
            "of the largest that the layer adds; their sinusoids are float32",
            most=1e-4,
        )
    )
    return lines, races


# --- roofline ----------------------------------------------------------------------------------


def kernel_work(sizes: Sizes) -> dict[str, roofline.Work]:
    """Counted work of each kernel from its pure-JAX form: attention, its VJP, decode, search."""
    length, block = sizes.lengths[0], sizes.block_length
    blocks = -(-length // block)
    length = blocks * block
    array = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    keys, values = (1, 1, length, sizes.key_dim), (1, 1, length, sizes.value_dim)
    operands = (
        array(keys),
        array(keys),
        array(values),
        array((1, sizes.codes, sizes.key_dim)),
        array((1, 1, blocks, sizes.codes, sizes.value_dim)),
        jax.ShapeDtypeStruct((1, 1, blocks, sizes.codes), jnp.int32),
    )

    def attend(q: Any, k: Any, v: Any, codebook: Any, means: Any, counts: Any) -> Any:
        return kernels.vq_attention(
            q, k, v, codebook, means, counts, block_length=block, implementation="xla"
        )

    def with_vjp(
        q: Any, k: Any, v: Any, codebook: Any, means: Any, counts: Any, cotangent: Any
    ) -> Any:
        form = lambda q, k, v, means: attend(q, k, v, codebook, means, counts)
        out, pull = jax.vjp(form, q, k, v, means)
        return out, pull(cotangent)

    window = block + 1
    one = (
        array((1, 1, sizes.key_dim)),
        array((1, 1, window, sizes.key_dim)),
        array((1, 1, window, sizes.value_dim)),
        jax.ShapeDtypeStruct((1, window), jnp.bool_),
        array((1, sizes.codes, sizes.key_dim)),
        array((1, 1, sizes.codes, sizes.value_dim)),
        jax.ShapeDtypeStruct((1, 1, sizes.codes), jnp.int32),
    )
    decode_step = partial(kernels.vq_attention_decode, implementation="xla")
    find = lambda x, codebook: nearest_code(x, codebook, implementation="xla").index
    vectors = array((sizes.tokens, sizes.code_dim)), array((sizes.codebook, sizes.code_dim))
    return {
        "vq_attention forward": roofline.count(attend, *operands),
        "vq_attention forward+vjp": roofline.count(with_vjp, *operands, array(values)),
        "vq_attention decode": roofline.count(decode_step, *one),
        "nearest_code": roofline.count(find, *vectors),
    }


# --- all of it ---------------------------------------------------------------------------------

PARTS: dict[str, Part] = {
    "attention": attention,
    "slope": slope,
    "decode": decode,
    "search": search,
}


def _rooflines(sizes: Sizes, details: Mapping[str, Any]) -> list[dict[str, Any]]:
    measured = {}
    if "search" in details:
        measured["nearest_code"] = details["search"]["timings"]["nearest_code"].median
    return roofline_rows(kernel_work(sizes), measured)


def bench(
    sizes: Sizes = FULL,
    *,
    parts: Sequence[str] = (*PARTS, "public", "roofline"),
    public: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the benchmark and print its tables.

    Args:
        sizes: problem sizes; targets count only where `sizes.judged`.
        parts: which of "attention", "slope", "decode", "search", "public", "roofline".
        public: a checkout of the public transformer-vq code, for the part "public".
        console: where to print; standard output by default.

    Returns:
        The record that `main` writes as JSON: environment, sizes, lines, timings, roofline.

    Example:
        >>> import io
        >>> record = bench(QUICK, parts=(), console=Console(file=io.StringIO()))
        >>> record["benchmark"], record["lines"]
        ('vq', [])
    """
    console = console or Console()
    runs = dict(PARTS) | {"public": partial(against_public, checkout=public)}
    record = run("vq", sizes, runs, chosen=parts, rooflines=_rooflines, console=console)
    if "skipped" in record["details"].get("public", {}):
        reason = record["details"]["public"]["skipped"]
        console.print(f"public transformer-vq layer: skipped, {reason}")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `jaxkit bench vq [--quick] [--parts ...] [--public PATH] [--out FILE]`.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        Exit status: 0 when everything ran, whatever the numbers say.
    """
    parser, finish = command(
        "vq",
        "Attention over vector-quantised keys against dense attention.",
        (*PARTS, "public", "roofline"),
    )
    parser.add_argument(
        "--public",
        type=Path,
        help="a clone of github.com/transformer-vq/transformer_vq (branch main) to compare with",
    )
    options = parser.parse_args(argv)
    sizes = QUICK if options.quick else FULL
    return finish(options, partial(bench, sizes, public=options.public))


if __name__ == "__main__":
    sys.exit(main())
