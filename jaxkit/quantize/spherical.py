"""Binary spherical quantization: signs on the unit sphere, `sign(u)/√d` with u = z/‖z‖."""

from jaxkit._typing import Array, Bool, Float
from jaxkit.quantize._common import check_mask, check_vectors, select_rows
from jaxkit.quantize.lfq import LFQOutput, lfq, lfq_entropies
from jaxkit.quantize.search import normalize

__all__ = ["spherical", "spherical_entropies"]


def spherical(
    z: Float[Array, "*batch dim"],
    *,
    bit_order: str = "little",
    mask: Bool[Array, "*batch"] | None = None,
) -> LFQOutput:
    """`code = sign(u)/√d`, u = z/‖z‖, straight-through from the code to u.

    Codes and vectors are both on the sphere, so that the error is bounded:
    ‖u - code‖² ≤ 2 - 2/√d. `LFQ` on normalised vectors with scale 1/√d.

    Args:
      z: Vectors of d ≤ 30 features.
      bit_order: Of the index, as in `lfq`.
      mask: False for vectors to leave out.

    Returns:
      `LFQOutput(z_q, index)`, as `lfq`. A vector of norm ≤ 1e-6 has no direction: no gradient, and
      like all zeros the code of minus signs.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or a name is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> out = spherical(jnp.array([3.0, -4.0, 1.0, 0.5]))
      >>> print(out.z_q, out.index)
      [ 0.5 -0.5  0.5  0.5] 13

    Source: Zhao, Xiong, Krähenbühl 2024 (arXiv 2406.07548).
    """
    dim = check_vectors(z)
    check_mask(mask, z.shape[:-1])
    return lfq(normalize(select_rows(mask, z)), scale=dim**-0.5, bit_order=bit_order, mask=mask)


def spherical_entropies(
    z: Float[Array, "*batch dim"],
    *,
    inv_temperature: float = 1.0,
    group_size: int | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`lfq_entropies` of z/‖z‖ with scale 1/√d.

    Args:
      z: Vectors.
      inv_temperature: τ.
      group_size: As in `lfq_entropies`.
      mask: False for vectors to leave out.
      axis_name: Mesh axes over which `z` is spread, inside `shard_map`.

    Returns:
      `(E H(p(·|z)), H(E p(·|z)))` in nats.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or a number is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> own, mean = spherical_entropies(jnp.array([[1.0], [-1.0]]), inv_temperature=9.0)
      >>> print(f"{own:.4f} {mean:.4f}")
      0.0000 0.6931

    Source: Zhao, Xiong, Krähenbühl 2024 (arXiv 2406.07548).
    """
    dim = check_vectors(z)
    check_mask(mask, z.shape[:-1])
    return lfq_entropies(
        normalize(select_rows(mask, z)),
        scale=dim**-0.5,
        inv_temperature=inv_temperature,
        group_size=group_size,
        mask=mask,
        axis_name=axis_name,
    )
