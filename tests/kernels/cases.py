"""The operations that the kernel contract, the lowerings and the compilations run over."""

from functools import partial

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxkit_kernels import dplr_generating_function, nearest_code, vandermonde, vq_attention
from jaxkit_kernels.cauchy import CauchyGpuBlocks, CauchyTpuBlocks, CauchyXlaBlocks
from jaxkit_kernels.nearest_code import (
    NearestCode,
    NearestCodeGpuBlocks,
    NearestCodeTpuBlocks,
    NearestCodeXlaBlocks,
)
from jaxkit_kernels.vandermonde import (
    VandermondeGpuBlocks,
    VandermondeTpuBlocks,
    VandermondeXlaBlocks,
)
from jaxkit_kernels.vq_attention import (
    VqAttentionGpuBlocks,
    VqAttentionTpuBlocks,
    VqAttentionXlaBlocks,
)

from tests.kernels.contract import Case, Operation


def make_cauchy(rng, heads, modes, rank=1, tied=False):
    """Stable well-damped problems: I + (c/2) S[pp] is far from singular."""
    alpha = rng.uniform(0.02, 0.5, (heads, modes))
    beta = rng.uniform(0, 4, (heads, modes))
    normal = lambda *shape: rng.standard_normal(shape) / np.sqrt(modes)
    pair = lambda *shape: (normal(heads, *shape, modes), normal(heads, *shape, modes))
    # Q = P: the matrix conj(P_r) P_s of each mode.
    p = normal(heads, rank, modes) + 1j * normal(heads, rank, modes)
    pp = p.conj()[:, :, None] * p[:, None]
    return (
        alpha,
        beta,
        pair(),
        pair(rank),
        pair(rank),
        pp.real if tied else (pp.real, pp.imag),
    )


def cauchy_oracle(alpha, beta, cb, cp, pb, pp, *, length):
    """The textbook form, node by node, on the full spectrum; not at z = -1."""
    both = lambda v: np.concatenate([v, v.conj()], -1)
    join = lambda pair: both(np.asarray(pair[0]) + 1j * np.asarray(pair[1]))
    lam = both(-np.asarray(alpha) + 1j * np.asarray(beta))  # eps Lambda / 2
    cb, cp, pb, pp = join(cb), join(cp), join(pb), join(pp)
    rank, out = cp.shape[1], []
    for index in range(length // 2 + 1):
        z = np.exp(-2j * np.pi * index / length)
        if 2 * index == length:
            out.append(np.full(alpha.shape[0], np.nan + 0j))
            continue
        resolvent = 1 / ((1 - z) / (1 + z) - lam)
        total = lambda v, r=resolvent: np.sum(
            v * r.reshape(r.shape[0], *(1,) * (v.ndim - 2), -1), -1
        )
        core = np.linalg.inv(np.eye(rank) + total(pp) / 2)
        value = total(cb) - np.einsum("hr,hrs,hs->h", total(cp), core, total(pb)) / 2
        out.append(value / (1 + z))
    value = np.stack(out, -1)
    return value.real, value.imag


def make_vandermonde(rng, heads, modes):
    return (
        rng.uniform(0.001, 0.3, (heads, modes)),
        rng.uniform(0, 4, (heads, modes)),
        rng.standard_normal((heads, modes)),
        rng.standard_normal((heads, modes)),
    )


def vandermonde_oracle(alpha, beta, v_re, v_im, *, length):
    ratio = np.exp(-np.asarray(alpha) + 1j * np.asarray(beta))
    value, out = np.asarray(v_re) + 1j * np.asarray(v_im), []
    for _ in range(length):
        out.append(2 * value.sum(-1).real)
        value = value * ratio
    return np.stack(out, -1)


CAUCHY = Case(
    name="cauchy",
    function=dplr_generating_function,
    make=make_cauchy,
    oracle=cauchy_oracle,
    small_blocks={
        "xla": CauchyXlaBlocks(chunk=8),
        "pallas_tpu": CauchyTpuBlocks(rows=8),
        "pallas_gpu": CauchyGpuBlocks(nodes=128, nodes_backward=128),
    },
    # Square of the resolvents in the cotangents: 1 / alpha.
    scale=4.0,
)
VANDERMONDE = Case(
    name="vandermonde",
    function=vandermonde,
    make=make_vandermonde,
    oracle=vandermonde_oracle,
    small_blocks={
        "xla": VandermondeXlaBlocks(block=3),
        "pallas_tpu": VandermondeTpuBlocks(rows=8),
        "pallas_gpu": VandermondeGpuBlocks(rows=2),
    },
    scale=4.0,
)
CASES = {case.name: case for case in (CAUCHY, VANDERMONDE)}


def nearest_code_oracle(x, codebook):
    x, codebook = np.asarray(x, np.float64), np.asarray(codebook, np.float64)
    distance = np.stack([np.sum((codebook - row) ** 2, axis=1) for row in x])
    order = np.argsort(distance, axis=1, kind="stable")
    none = np.full((len(x), 1), len(codebook))
    index, second = np.concatenate([order, none], axis=1)[:, :2].T
    counts = np.bincount(index, minlength=len(codebook))
    return NearestCode(index, distance[np.arange(len(x)), index], second, counts)


def make_nearest_code(rng, tokens, codes, features):
    """Gaussian, without tokens whose three nearest codes are hard to tell apart in float32."""
    short = lambda *shape: rng.standard_normal(shape).astype(ml_dtypes.bfloat16).astype(np.float64)
    codebook, kept = short(codes, features), []
    while len(kept) < tokens:
        row = short(features)
        distance = np.sort(np.sum((codebook - row) ** 2, axis=1))[:3]
        if (np.diff(distance) > 1e-4 * (1 + distance[-1])).all():
            kept.append(row)
    return np.stack(kept), codebook


NEAREST_CODE = Operation(
    name="nearest_code",
    function=partial(nearest_code, distance=True, second=True, counts=True),
    arguments=lambda tokens, codes, features: ((tokens, features), (codes, features)),
    make=make_nearest_code,
    oracle=nearest_code_oracle,
    shapes=((1, 1, 1), (7, 5, 3), (130, 129, 2), (270, 300, 33)),
    small_blocks={
        "xla": NearestCodeXlaBlocks(tokens=7, codes=24),
        "pallas_tpu": NearestCodeTpuBlocks(tokens=128, codes=128),
        "pallas_gpu": NearestCodeGpuBlocks(tokens=128, codes=4),
    },
    large=(65536, 8192, 64),
    dense=lambda tokens, codes, features: 4 * tokens * codes,
)


def attention_arguments(batch, heads, groups, blocks, length, codes, dk, dv):
    time, lags = blocks * length, length - length // 3 + 1
    return (
        (batch, heads, time, dk),
        (batch, groups, time, dk),
        (batch, groups, time, dv),
        (groups, codes, dk),
        (batch, groups, blocks, codes, dv),
        (batch, groups, blocks, codes),
        (heads, lags),
    )


def make_vq_attention(rng, *shape):
    """Gaussian; counts as after so many blocks, some codes empty."""
    short = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float64)
    shapes = attention_arguments(*shape)
    operands = [short(rng.standard_normal(s)) for s in shapes]
    operands[5] = np.minimum(rng.integers(0, 3, shapes[5]), np.arange(shape[3])[:, None]) * 1.0
    return tuple(operands)


def vq_attention_operation(q, k, v, codebook, means, counts, bias, **options):
    """With the block length and the window of the shapes, and counts as integers."""
    return vq_attention(
        *(q, k, v, codebook, means, counts.astype(jnp.int32), bias),
        block_length=q.shape[2] // counts.shape[2],
        window=bias.shape[1] - 1,
        **options,
    )


def vq_attention_oracle(q, k, v, codebook, means, counts, bias):
    """Query by query: the keys it sees one by one, the older ones by their codes."""
    operands = [np.asarray(x, np.float64) for x in (q, k, v, codebook, means, counts, bias)]
    q, k, v, codebook, means, counts, bias = operands
    heads, time = q.shape[1:3]
    length = time // counts.shape[2]
    out = np.empty((*q.shape[:3], v.shape[-1]))
    for b, h, i in np.ndindex(*q.shape[:3]):
        g, r = h * k.shape[1] // heads, i // length
        near = np.arange(max(r - 1, 0) * length, i + 1)
        lag = i - near
        some = counts[b, g, r] > 0
        by_lag = np.where(lag < bias.shape[1], bias[h, np.minimum(lag, bias.shape[1] - 1)], 0)
        recent = k[b, g, near] @ q[b, h, i] + by_lag
        cached = codebook[g, some] @ q[b, h, i] + np.log(counts[b, g, r, some])
        weights = np.exp(np.concatenate([recent, cached]))
        values = np.concatenate([v[b, g, near], means[b, g, r, some]])
        out[b, h, i] = weights @ values / weights.sum()
    return out


def attention_scores(batch, heads, groups, blocks, length, codes, dk, dv):
    return 4 * batch * heads * blocks * length * (2 * length + codes)


VQ_ATTENTION = Operation(
    name="vq_attention",
    function=vq_attention_operation,
    arguments=attention_arguments,
    make=make_vq_attention,
    oracle=vq_attention_oracle,
    shapes=(
        (1, 1, 1, 1, 1, 1, 1, 1),
        (1, 2, 1, 2, 2, 3, 3, 2),
        (2, 4, 2, 3, 5, 4, 3, 5),
        (1, 2, 1, 3, 70, 130, 5, 3),
    ),
    small_blocks={
        "xla": VqAttentionXlaBlocks(blocks=1, queries=7),
        "pallas_tpu": VqAttentionTpuBlocks(queries=128, keys=128),
        "pallas_gpu": VqAttentionGpuBlocks(columns=128),
    },
    # Long blocks, so that what grows with the time alone is small beside the scores.
    large=(1, 2, 1, 64, 2048, 2048, 64, 64),
    dense=attention_scores,
    differentiable=(0, 1, 2, 4, 6),
    scale=4.0,
    compiled=jnp.bfloat16,
)
OPERATIONS = {operation.name: operation for operation in (NEAREST_CODE, VQ_ATTENTION)}
