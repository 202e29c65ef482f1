"""Gradients of the block form: those of the quadratic form that mixes k̂ and sg(k̂)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.attention import vq
from tests.attention.vq_cases import XLA, biases, jit, operands

NAMES = ("q", "k", "v", "codebook", "bias")
# Length 12 in blocks of every divisor, with windows from nothing to a whole block, few and many
# codes, every reduction and head type in turn.
TRIPLES = [
    (length, window, codes)
    for length in (1, 2, 3, 4, 6, 12)
    for window, codes in sorted({(0, 4), (length // 2, 1), (length, 4)})
]
HEADS = [(1, 1), (2, 2), (2, 1), (4, 2)]
MIXES = list(
    itertools.islice(itertools.cycle(zip(vq.REDUCTIONS, HEADS, strict=True)), len(TRIPLES))
)


def both(args, run, reference):
    """Value and gradients of Σ out · weight, of two functions."""
    shape = jax.eval_shape(run, *args).shape
    weight = jnp.asarray(np.random.default_rng(9).standard_normal(shape), args[0].dtype)

    @jit
    def evaluate(*args):
        pulls = []
        for function in (run, reference):
            out, pull = jax.vjp(function, *args)
            pulls.append((out, pull(weight)))
        return pulls

    return evaluate(*args)


@pytest.mark.parametrize(
    ("triple", "mix"), list(zip(TRIPLES, MIXES, strict=True)), ids=lambda x: "-".join(map(str, x))
)
def test_every_divisor_triple(triple, mix):
    length, window, codes = triple
    reduction, (heads, groups) = mix
    q, k, v, codebook = operands(batch=1, heads=heads, groups=groups, codes=codes)
    bias = biases(q, window, "table")
    options = {"block_length": length, "window": window}

    def run(q, k, v, codebook, bias):
        return vq.vq_attention(q, k, v, codebook, bias=bias, reduction=reduction, **options, **XLA)

    def reference(q, k, v, codebook, bias):
        return vq.quadratic_attention(q, k, v, codebook, bias=bias, **options)

    (out, grads), (expected, wanted) = both((q, k, v, codebook, bias), run, reference)
    np.testing.assert_allclose(out, expected, atol=1e-12, rtol=0)
    for name, grad, want in zip(NAMES, grads, wanted, strict=True):
        np.testing.assert_allclose(grad, want, atol=1e-12, rtol=0, err_msg=name)
    assert not np.asarray(grads[3]).any()
    assert np.abs(grads[2]).min() > 0


@pytest.mark.parametrize(
    ("length", "kind", "options"),
    [(34, "rows", {}), (35, "table", {"rotary_base": 30.0, "grad_through_cache": False})],
    ids=["kernel", "rotary"],
)
def test_the_recurrence_has_the_gradients_of_the_quadratic_form(length, kind, options):
    """34 blocks are nine steps, which the gradient runs again three by three."""
    q, k, v, codebook = operands(batch=2, heads=2, groups=1, length=length)
    bias = biases(q, 1, kind)
    mask = jnp.asarray(np.random.default_rng(1).random((2, length)) < 0.8)
    options = {"block_length": 1, "mask": mask, **options}

    def run(q, k, v, codebook, bias):
        return vq.vq_attention(q, k, v, codebook, bias=bias, reduction="serial", **options, **XLA)

    def reference(q, k, v, codebook, bias):
        return vq.quadratic_attention(q, k, v, codebook, bias=bias, **options)

    (out, grads), (expected, wanted) = both((q, k, v, codebook, bias), run, reference)
    np.testing.assert_allclose(out, expected, atol=1e-12, rtol=0)
    for name, grad, want in zip(NAMES, grads, wanted, strict=True):
        np.testing.assert_allclose(grad, want, atol=1e-12, rtol=0, err_msg=name)


@pytest.mark.parametrize("rotary_base", [None, 30.0])
@pytest.mark.parametrize("reduction", ["serial", "matmul"])
def test_no_gradient_through_the_cache(reduction, rotary_base):
    q, k, v, codebook = operands(batch=1, heads=2, groups=1, length=11)
    bias = biases(q, 2, "rows")
    options = {"block_length": 2, "grad_through_cache": False, "rotary_base": rotary_base}

    def run(q, k, v, codebook, bias):
        return vq.vq_attention(q, k, v, codebook, bias=bias, reduction=reduction, **options, **XLA)

    def reference(q, k, v, codebook, bias):
        return vq.quadratic_attention(q, k, v, codebook, bias=bias, **options)

    (out, grads), (expected, wanted) = both((q, k, v, codebook, bias), run, reference)
    np.testing.assert_allclose(out, expected, atol=1e-12, rtol=0)
    for name, grad, want in zip(NAMES, grads, wanted, strict=True):
        np.testing.assert_allclose(grad, want, atol=1e-12, rtol=0, err_msg=name)


def test_the_key_gradient_is_not_the_full_straight_through_one():
    q, k, v, codebook = operands(batch=1, heads=1, groups=1)

    @jit
    def grads(q, k, v):
        loss = lambda k, n: jnp.sum(vq.quadratic_attention(q, k, v, codebook, block_length=n) ** 2)
        own = lambda k: jnp.sum(vq.vq_attention(q, k, v, codebook, block_length=2, **XLA) ** 2)
        return jax.grad(own)(k), jax.grad(loss)(k, None), jax.grad(loss)(k, 12)

    own, full, whole = grads(q, k, v)
    assert float(jnp.abs(own - full).max()) > 1e-3
    # One block is all recent: there it is.
    np.testing.assert_allclose(whole, full, atol=1e-12)


def test_gradients_against_finite_differences():
    q, k, v, codebook = operands(batch=1, heads=2, groups=1, length=9)
    bias = biases(q, 2, "table")
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((1, 2, 9, 3)))
    step = 1e-6

    @jit
    def run(q, v, bias):
        loss = lambda q, v, bias: jnp.sum(
            weight * vq.vq_attention(q, k, v, codebook, bias=bias, block_length=2, **XLA)
        )
        moved = lambda d: loss(q + d * q[::-1, ::-1], v + d * jnp.cos(v), bias + d * jnp.sin(bias))
        slope = (moved(step) - moved(-step)) / (2 * step)
        grads = jax.grad(loss, argnums=(0, 1, 2))(q, v, bias)
        along = (q[::-1, ::-1], jnp.cos(v), jnp.sin(bias))
        return slope, sum(jnp.sum(g * d) for g, d in zip(grads, along, strict=True))

    slope, product = run(q, v, bias)
    np.testing.assert_allclose(product, slope, rtol=1e-7)
