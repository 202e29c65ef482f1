"""Gradients through a step that has none: from the code back to the encoder.

All estimators but Gumbel-softmax are one formula. Forward, `z_q = q`, bit for bit; backward,
`∂L/∂z = Gᵀ ∂L/∂z_q` with a matrix G that is held constant:

    z_q = sg(q) + sg(G) (z - sg(z)).

| estimator           | G                                                               |
|---------------------|-----------------------------------------------------------------|
| `ste`               | I (straight-through)                                            |
| `rotation`          | λR: rotates z onto q in their plane and scales it, λ = ‖q‖/‖z‖  |
| `rotation_unscaled` | R                                                               |
| `reflection`        | λ(I - 2ssᵀ), s ∝ z/‖z‖ - q/‖q‖: also maps z to q                |
| `none`              | 0: no gradient to z; q keeps its own                            |
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_real
from jaxkit._typing import Array, Bool, Float, Int, Key
from jaxkit.quantize._common import check_vectors, select_rows, wide_dtype
from jaxkit.quantize._sharding import BATCH, VECTORS, automatic
from jaxkit.quantize.search import code_logits, lookup, nearest_code, normalize

__all__ = ["ESTIMATORS", "estimate", "gumbel_softmax_code"]

ESTIMATORS = ("ste", "rotation", "rotation_unscaled", "reflection", "none")


def _norm(x: Array) -> Array:
    """‖x‖ of every row, without overflow or underflow of the squares."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(jnp.sum((x / scale) ** 2, axis=-1, keepdims=True))


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _plane(z_unit: Array, q_unit: Array) -> tuple[Array, Array, Array]:
    """(cos θ, sin θ, u) with q̂ = cos θ ẑ + sin θ u, u ⊥ ẑ a unit vector, or 0 where q̂ = ±ẑ.

    r = (ẑ + q̂)/‖ẑ + q̂‖ would lose all digits where ẑ and q̂ are nearly opposite; u is orthogonal
    to ẑ to the last digit, since what a first projection leaves along ẑ is taken off by a second.
    """
    cos = _dot(z_unit, q_unit)
    across = q_unit - cos * z_unit
    across = across - _dot(z_unit, across) * z_unit
    sin = _norm(across)
    clear = sin > 16 * jnp.finfo(sin.dtype).eps  # else it is the rounding error of q̂ = ±ẑ
    return cos, jnp.where(clear, sin, 0), jnp.where(clear, across / jnp.where(clear, sin, 1), 0)


def _transport(estimator: str, eps: float, z: Array, q: Array, x: Array) -> Array:
    """G x for every row, in O(d)."""
    wide, dtype = wide_dtype(x), x.dtype
    z, q, x = z.astype(wide), q.astype(wide), x.astype(wide)
    z_norm, q_norm = _norm(z), _norm(q)
    usable = (z_norm > eps) & (q_norm > eps) & jnp.isfinite(z_norm) & jnp.isfinite(q_norm)
    # No directions there, and no NaN that the select of `y` would hand to the transpose.
    z_unit = jnp.where(usable, z / jnp.where(usable, z_norm, 1), 0)
    q_unit = jnp.where(usable, q / jnp.where(usable, q_norm, 1), 0)
    cos, sin, u = _plane(z_unit, q_unit)
    along, aside = _dot(z_unit, x), _dot(u, x)
    # In the basis (ẑ, u) of their plane: [[cos, -sin], [sin, cos]], or [[cos, sin], [sin, -cos]].
    # Everything orthogonal to the plane stays.
    sign = -1 if estimator == "reflection" else 1
    y = x + z_unit * ((cos - 1) * along - sign * sin * aside)
    y = y + u * (sin * along + (sign * cos - 1) * aside)
    y = jnp.where(usable, y, x)
    if estimator != "rotation_unscaled":
        y = y * (jnp.where(usable, q_norm, 1) / jnp.where(usable, z_norm, 1))
    return y.astype(dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _estimate(estimator, eps, z, q):
    return q


@_estimate.defjvp
def _estimate_jvp(estimator, eps, primals, tangents):
    """The derivative of the formula above; the sum itself would turn -0 into 0 and inf into NaN."""
    z, q = primals
    moved, _ = tangents
    z_q = _estimate(estimator, eps, z, q)
    if estimator == "ste":
        return z_q, moved
    # Kept for the backward pass are z and q alone; unit vectors and norms are computed again.
    transport = jax.checkpoint(partial(_transport, estimator, eps))
    return z_q, transport(jax.lax.stop_gradient(z), jax.lax.stop_gradient(q), moved)


def estimate(
    z: Float[Array, "*batch dim"],
    q: Float[Array, "*batch dim"],
    *,
    estimator: str = "ste",
    eps: float = 1e-6,
) -> Float[Array, "*batch dim"]:
    """`q` with a gradient to `z`: `z_q = sg(q) + sg(G)(z - sg(z))`, forward bitwise q.

    For the rotation, with ẑ = z/‖z‖, q̂ = q/‖q‖, r = (ẑ + q̂)/‖ẑ + q̂‖ and λ = ‖q‖/‖z‖,

        Gᵀg = λ[g - 2r(rᵀg) + 2ẑ(q̂ᵀg)],

    so that ⟨z, ∂_z⟩ = ⟨q, g⟩ and ‖∂_z‖ = λ‖g‖: the gradient makes the same angle with z as it did
    with q. It is not invariant to a common shift of z and q, and tends to straight-through as the
    shift grows. O(d) a vector. Forward and reverse mode, of any order; no gradient to `q` (with
    `none`: to `q` alone).

    Args:
      z: Encoder output.
      q: Its codes, with the shape and dtype of `z`.
      estimator: `ste`, `rotation`, `rotation_unscaled`, `reflection` or `none`.
      eps: Where ‖z‖ or ‖q‖ is at most this, or not finite, there is no direction, and G = I.

    Returns:
      `q`, with that gradient. Exactly opposite z and q (to rounding) are mapped by a reflection.

    Raises:
      TypeError: If `z` is not real floating-point or `q` has another dtype.
      ValueError: If shapes differ, `estimator` is unknown or `eps` is negative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> z, q = jnp.array([3.0, 0.0, 4.0]), jnp.array([0.0, 5.0, 12.0])
      >>> loss = lambda z, name: estimate(z, q, estimator=name) @ jnp.array([1.0, -2.0, 0.5])
      >>> for name in ("ste", "rotation"):
      ...     print([f"{x:.4f}" for x in jax.grad(loss)(z, name)])
      ['1.0000', '-2.0000', '0.5000']
      ['1.0188', '-5.5982', '-1.7641']

    Source: Fifty et al. 2024 (arXiv 2410.06424); van den Oord et al. 2017 (arXiv 1711.00937); post
    10489.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_real("eps", eps, least=0)
    check_vectors(z)
    if tuple(q.shape) != tuple(z.shape):
        raise ValueError(f"q must have the shape {z.shape} of z; got {tuple(q.shape)}.")
    if q.dtype != z.dtype:
        raise TypeError(f"q must have the dtype {z.dtype} of z; got {q.dtype}.")
    return q if estimator == "none" else _estimate(estimator, float(eps), z, q)


@automatic((VECTORS, BATCH))
def gumbel_softmax_code(
    key: Key | None,
    z: Float[Array, "*batch dim"],
    codebook: Float[Array, "codes dim"],
    *,
    temperature: float = 1.0,
    hard: bool = True,
    metric: str = "euclidean",
    mask: Bool[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch dim"], Int[Array, "*batch"]]:
    """A code drawn with probability ∝ exp(-‖z - e_k‖²), and the gradient of its relaxation.

    With Gumbel noise n, `y = softmax((-‖z - e_k‖² + n_k)/temperature)`, and the drawn index is its
    argmax. The result is the drawn code with the gradient of `Σ_k y_k e_k` (`hard`), or this sum
    itself. Gradients go to `z` and to the codebook: that is how codes learn here. A commitment or
    codebook loss does harm: it pulls vectors and codes drawn at random to each other, until all of
    them are one point. O(T K) memory.

    Args:
      key: Random key; None for no noise (evaluation): the nearest code.
      z: Vectors.
      codebook: Codes.
      temperature: Of the relaxation, above 0. It does not change which code is drawn.
      hard: Return the code rather than the mixture.
      metric: `euclidean`, or `cosine` (on normalised vectors and codes).
      mask: False for vectors to leave out.

    Returns:
      `(z_q, index)`: `z_q` in the dtype of `z`, zeros where masked, NaN where `z` is not finite;
      index int32, K in both cases.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape, a name or the temperature is wrong.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> codebook = jnp.array([[0.0, 0.0], [9.0, 9.0]])
      >>> z_q, index = gumbel_softmax_code(jax.random.key(0), jnp.array([[8.0, 9.0]]), codebook)
      >>> print(z_q, index)
      [[9. 9.]] [1]

    Source: Jang, Gu, Poole 2016 (arXiv 1611.01144).
    """
    check_real("temperature", temperature, above=0)
    logits, usable = code_logits(z, codebook, metric=metric, mask=mask)
    wide = logits.dtype
    codes = codebook.astype(wide)
    codes = normalize(codes) if metric == "cosine" else codes
    # Rows without a code take part with zeros, and their noise moves no other row.
    logits = jnp.where(usable[..., None], logits, 0)
    if key is None:
        index = nearest_code(z, codebook, metric=metric, mask=mask)
    else:
        logits = logits + jax.random.gumbel(key, logits.shape, wide)
        index = jnp.where(usable, jnp.argmax(logits, axis=-1).astype(jnp.int32), codes.shape[0])
    weights = jax.nn.softmax(logits / temperature, axis=-1)
    mixture = jnp.einsum("...k,kd->...d", weights, codes, precision="highest")
    drawn = lookup(jax.lax.stop_gradient(codes), index)
    z_q = _estimate("ste", 0.0, mixture, drawn) if hard else mixture
    z_q = jnp.where(usable[..., None], z_q, jnp.nan)
    return select_rows(mask, z_q).astype(z.dtype), index
