"""Decoding in constant memory, and the hand-over between prefill and steps at any cut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.attention import vq
from tests.attention.vq_cases import XLA, biases, by_hand, decoded, in_pieces, jit, operands


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({}, 3),
        ({"rotary_base": 15.0}, 1),
        ({"cache": False, "local": "window"}, 2),
        ({"cache": False, "rotary_base": 15.0}, 3),
    ],
    ids=["cache", "rotary", "window", "rotary-blocks"],
)
def test_any_cut_gives_the_outputs_and_the_state_of_single_steps(options, window):
    q, k, v, codebook = operands(heads=2, groups=1, length=13, batch=2)
    bias = biases(q, window, "table")
    mask = jnp.asarray(np.random.default_rng(4).random((2, 13)) < 0.8)
    options = {"bias": bias, "mask": mask, "block_length": 3, **options}

    @jit
    def run(q, k, v):
        whole = vq.quadratic_attention(q, k, v, codebook, window=window, **options)
        common = {"window": window, **options, **XLA}
        cuts = [(13,), (5, 1, 1, 2, 4)]
        every = [in_pieces(q, k, v, codebook, cut, **common) for cut in cuts]
        return whole, [decoded(q, k, v, codebook, **common), *every]

    whole, every = run(q, k, v)
    _, last = every[0]
    for out, state in every:
        np.testing.assert_allclose(out, whole, atol=1e-12, rtol=0)
        assert int(state.position) == 13
        np.testing.assert_array_equal(state.codes, last.codes)
        np.testing.assert_array_equal(state.cache.counts, last.cache.counts)
        np.testing.assert_allclose(state.values, last.values, atol=0)
        np.testing.assert_allclose(state.cache.means, last.cache.means, atol=1e-12)


def test_every_prefix_length_hands_over():
    """One compilation for all: the prefix is what the mask leaves of a fixed length."""
    q, k, v, codebook = operands(heads=1, groups=1, length=11, batch=1)
    whole = by_hand(q, k, v, codebook)
    prefill = jit(partial(vq.prefill, block_length=3, **XLA))
    step = jit(partial(vq.step, **XLA))
    for prefix in range(1, 9):
        state = vq.init_state(1, 1, 5, 3, window=3, dtype=v.dtype)
        # Padding in front counts as positions, and is never seen.
        at = jnp.arange(8) - (8 - prefix)
        part = [x[:, :, jnp.maximum(at, 0)] for x in (q, k, v)]
        out, state = prefill(state, *part, codebook, mask=(at >= 0)[None])
        np.testing.assert_allclose(out[:, :, 8 - prefix :], whole[:, :, :prefix], atol=1e-12)
        for t in range(prefix, min(prefix + 2, 11)):
            out, state = step(state, *(x[:, :, t] for x in (q, k, v)), codebook)
            np.testing.assert_allclose(out, whole[:, :, t], atol=1e-12)


def test_the_state_has_one_size_and_the_cards():
    state = jax.eval_shape(lambda: vq.init_state(1, 1, 512, 1536, window=512))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    # The card's (S + W)(dv + 1) numbers; the ring has W + 1 slots, and a position.
    assert size == 6_295_552 + 4 * (1536 + 1) + 4
    q, k, v, codebook = operands(batch=1, length=1)
    one = tuple(x[:, :, 0] for x in (q, k, v))
    state = vq.init_state(1, 2, 5, 3, window=4, dtype=v.dtype)
    step = lambda state: vq.step(state, *one, codebook, **XLA)[1]
    shapes = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert shapes(jax.eval_shape(step, state)) == shapes(state)


def test_the_cache_is_the_mean_over_all_tokens_that_left_the_window():
    q, k, v, codebook = operands(batch=1, heads=1, groups=1, length=40, codes=3)
    _, state = jit(lambda *x: decoded(*x, codebook, window=4, **XLA))(q, k, v)
    codes = np.asarray(vq.nearest_codes(k, codebook))[0, 0]
    for s in range(3):
        old = np.asarray(v)[0, 0, :35][codes[:35] == s]
        assert int(state.cache.counts[0, 0, s]) == len(old)
        np.testing.assert_allclose(state.cache.means[0, 0, s], old.mean(0), atol=1e-12)
    # The ring: position p in slot p mod 5.
    for p in range(35, 40):
        assert int(state.codes[0, 0, p % 5]) == codes[p]
        np.testing.assert_array_equal(state.values[0, 0, p % 5], v[0, 0, p])


def test_what_is_not_finite_is_handed_over():
    """From prefill to steps and back, as in the window, in the ring, and in the cache."""
    q, k, v, codebook = operands(batch=3, heads=2, groups=1, length=14)
    k = k.at[0, 0, 4, 0].set(jnp.nan)
    v = v.at[1, 0, 4, 0].set(jnp.inf)

    @jit
    def run(q, k, v):
        cuts = [(14,), (5, 1, 1, 7)]
        return [
            in_pieces(q, k, v, codebook, cut, window=2, block_length=3, **XLA)[0] for cut in cuts
        ]

    whole = by_hand(q[2:], k[2:], v[2:], codebook)
    for out in run(q, k, v):
        np.testing.assert_allclose(out[2:], whole, atol=1e-12)
        assert bool(jnp.isfinite(out[:2, :, :4]).all())
        assert bool(jnp.isnan(out[:2, :, 4:]).all())


def test_the_recurrence_continues_from_a_state():
    """Many blocks by `reduction="serial"`, after some tokens by `step` and before some more."""
    q, k, v, codebook = operands(batch=1, heads=2, groups=1, length=20)
    bias = biases(q, 1, "rows")

    @jit
    def run(q, k, v, bias):
        state = vq.init_state(1, 1, 5, 3, window=1, dtype=v.dtype)
        outs = []
        for start, stop in ((0, 1), (1, 2), (2, 19), (19, 20)):
            part = [x[:, :, start:stop] for x in (q, k, v)]
            row = bias[:, :, start:stop]
            if stop - start == 1:
                last = [x[:, :, 0] for x in part]
                out, state = vq.step(state, *last, codebook, bias=row[:, :, 0], **XLA)
                outs.append(out[:, :, None])
            else:
                out, state = vq.prefill(
                    state, *part, codebook, bias=row, block_length=2, reduction="serial", **XLA
                )
                outs.append(out)
        return jnp.concatenate(outs, axis=2)

    np.testing.assert_allclose(
        run(q, k, v, bias), by_hand(q, k, v, codebook, bias, 1), atol=1e-12, rtol=0
    )


def test_gradients_flow_through_a_step():
    q, k, v, codebook = operands(batch=1, heads=1, groups=1, length=4)

    @jit
    @partial(jax.grad, argnums=(0, 1, 2))
    def run(q, k, v):
        return jnp.sum(decoded(q, k, v, codebook, window=1, **XLA)[0] ** 2)

    for grad in run(q, k, v):
        assert bool(jnp.isfinite(grad).all())
        assert float(jnp.abs(grad).max()) > 1e-6


def test_errors_name_the_argument():
    q, k, v, codebook = operands(batch=1)
    one = tuple(x[:, :, 0] for x in (q, k, v))
    state = vq.init_state(1, 2, 5, 3, window=3, dtype=v.dtype)
    make = lambda **o: vq.init_state(*(1, 2, 5, 3), **{"window": 3} | o)
    cases = [
        (lambda: make(window=-1), "window must be at least 0"),
        (lambda: make(cache=False), "block_length must be given"),
        (lambda: make(cache=False, local="no"), "local must be one of"),
        (lambda: vq.init_state(1, 2, 0, 3, window=3), "num_codes must be at least 1"),
        (lambda: vq.step(state, *one, codebook[:, :4]), r"state.cache.means must have shape"),
        (lambda: vq.step(state, one[0], one[1][:, :1], one[2], codebook), "v must have shape"),
        (lambda: vq.step(state, *one, codebook, bias=jnp.zeros((4, 3))), "bias must have shape"),
        (lambda: vq.step(state, *one, codebook, mask=jnp.ones(2, bool)), "mask must have shape"),
        (
            lambda: vq.step(make(cache=False, block_length=2), *one, codebook, cache=False),
            "block_length must be given",
        ),
        (lambda: vq.prefill(state, q, k, v, codebook, block_length=2), "window must be at most"),
        (lambda: vq.prefill(state, q, k, v, codebook, block_length=0), "block_length must be at"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="codes must be integers"):
        vq.step(state, *one, codebook, codes=jnp.zeros((1, 2)))
