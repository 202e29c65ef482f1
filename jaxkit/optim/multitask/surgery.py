"""PCGrad, GradVac and GradDrop: gradients are changed pair by pair, or entry by entry."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkit._checks import check_real
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Float, Key
from jaxkit.optim.multitask._gram import pick, prepare

__all__ = ["GradVacState", "graddrop", "gradvac", "gradvac_init", "pcgrad"]


def _order(key: Key | None, tasks: int) -> Array:
    """For every task the order of its partners; as they come without a key."""
    if key is None:
        return jnp.tile(jnp.arange(tasks), (tasks, 1))
    keys = jax.random.split(key, tasks)
    return jax.vmap(lambda k: jax.random.permutation(k, tasks))(keys)


def pcgrad(gram: Float[Array, "tasks tasks"], *, key: Key | None = None) -> Float[Array, " tasks"]:
    """Project each gradient off those that it conflicts with, one after the other; add them up.

    From c = e_i, for j ≠ i: where q = (Gc)_j < 0, c_j −= q/G_jj. The weights are the sum of the c.

    Args:
      gram: G = J Jᵀ.
      key: of the order of j, a new one for each i; without a key the tasks' own order.

    Returns:
      w; zero for tasks whose gradient is zero or not finite.

    Example:
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> print(jnp.array_str(pcgrad(J @ J.T), precision=4))
      [2.2222 1.5789]

    Source: Yu et al. 2020 (arXiv 2001.06782); post 8896.
    """
    prepared = prepare(gram)
    G, alive, norms, _ = prepared
    tasks = len(G)

    def project(i: Array, order: Array) -> Array:
        def step(c: Array, j: Array) -> tuple[Array, None]:
            q = jnp.where((j != i) & alive[j], G[j] @ c, 0)
            return c.at[j].add(jnp.maximum(-q, 0) / norms[j] ** 2), None

        start = jnp.where((jnp.arange(tasks) == i) & alive[i], 1, 0).astype(G.dtype)
        return jax.lax.scan(step, start, order)[0]

    changed = jax.vmap(project)(jnp.arange(tasks), _order(key, tasks))
    return pick(jnp.sum(changed, axis=0), prepared, gram)


class GradVacState(NamedTuple):
    """Moving averages ρ_ij of the cosines, `[tasks, tasks]`."""

    rho: Array


def gradvac_init(tasks: int) -> GradVacState:
    """ρ = 0.

    Example:
      >>> gradvac_init(2).rho.shape
      (2, 2)
    """
    return GradVacState(jnp.zeros((tasks, tasks)))


def gradvac(
    gram: Float[Array, "tasks tasks"],
    state: GradVacState,
    *,
    beta: float = 0.01,
    key: Key | None = None,
) -> tuple[Float[Array, " tasks"], GradVacState]:
    r"""PCGrad with a target for each pair of tasks: the cosine that they have had on average.

    Where φ = cos(g_i', g_j) < ρ_ij, the multiple of g_j is added to g_i' after which the cosine is
    ρ_ij: |g_i'| (ρ√(1−φ²) − φ√(1−ρ²)) / (|g_j| √(1−ρ²)). Then ρ_ij ← (1−β)ρ_ij + βφ.

    Args:
      gram: G = J Jᵀ.
      state: from `gradvac_init`, or the step before.
      beta: β; the paper's 0.01.
      key: of the order of j, as in `pcgrad`.

    Returns:
      w, and the new state.

    Raises:
      ValueError: beta outside [0, 1].

    Example:
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> w, state = gradvac(J @ J.T, gradvac_init(2))  # with ρ = 0 it is PCGrad
      >>> print(jnp.array_str(w, precision=4))
      [2.2222 1.5789]

    Source: Wang et al. 2020 (arXiv 2010.05874).
    """
    check_real("beta", beta, least=0, most=1)
    prepared = prepare(gram)
    G, alive, norms, _ = prepared
    tasks = len(G)

    def vaccinate(i: Array, order: Array, rho_i: Array) -> tuple[Array, Array]:
        def step(carry: tuple[Array, Array], j: Array) -> tuple[tuple[Array, Array], None]:
            c, rhos = carry
            active = (j != i) & alive[j] & alive[i]
            size = jnp.sqrt(jnp.maximum(c @ G @ c, 0))
            active = active & (size > 0)
            phi = jnp.clip(G[j] @ c / (jnp.where(active, size, 1) * norms[j]), -1, 1)
            rho = rhos[j]
            sine = jnp.sqrt(jnp.maximum(1 - rho**2, jnp.finfo(G.dtype).eps))
            add = size * (rho * jnp.sqrt(1 - phi**2) - phi * sine) / (norms[j] * sine)
            c = c.at[j].add(jnp.where(active & (phi < rho), add, 0))
            return (c, rhos.at[j].set(jnp.where(active, (1 - beta) * rho + beta * phi, rho))), None

        start = jnp.where((jnp.arange(tasks) == i) & alive[i], 1, 0).astype(G.dtype)
        return jax.lax.scan(step, (start, rho_i), order)[0]

    rho = state.rho.astype(G.dtype)
    changed, new = jax.vmap(vaccinate)(jnp.arange(tasks), _order(key, tasks), rho)
    return pick(jnp.sum(changed, axis=0), prepared, gram), GradVacState(new.astype(state.rho.dtype))


def graddrop(jacobian: Any, *, key: Key) -> Any:
    """Keep in every coordinate the gradients of one sign, drawn at random by their purity.

    p = (1 + Σ g / Σ|g|)/2; with one U ~ U(0, 1) a coordinate, positive entries are kept where
    p > U and negative ones where p < U, and added up.

    Args:
      jacobian: pytree of leaves `[tasks, ...]`.
      key: random key.

    Returns:
      u, a pytree of leaves `[...]`.

    Example:
      >>> J = jnp.array([[1.0, -2.0, 1.0], [3.0, -1.0, -1.0]])
      >>> print(graddrop(J, key=jax.random.key(0))[:2])  # without conflict all is kept
      [ 4. -3.]

    Source: Chen et al. 2020 (arXiv 2010.06808).
    """
    leaves, treedef = jax.tree.flatten(jacobian)
    kept = [_drop(leaf, jax.random.fold_in(key, number)) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, kept)


def _drop(rows: Array, key: Key) -> Array:
    g = rows.astype(wide(rows.dtype))
    size = jnp.sum(jnp.abs(g), axis=0)
    purity = (1 + jnp.sum(g, axis=0) / jnp.where(size > 0, size, 1)) / 2
    positive = purity > jax.random.uniform(key, purity.shape, g.dtype)
    # Where p = U neither sign is kept; it has no probability.
    kept = jnp.where(positive[None], jnp.maximum(g, 0), jnp.minimum(g, 0))
    return jnp.sum(kept, axis=0).astype(rows.dtype)
