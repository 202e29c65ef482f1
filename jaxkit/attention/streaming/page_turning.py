"""Page turning: an RNN that reads the whole prefix again before every output.

A state of constant size cannot hold a growing past; but nothing forces an RNN to read each token
only once. Given O(L²) time it may turn back the pages for every output, and what it then computes
with constant space includes softmax attention: newest token first, so that its first step meets the
query, with (q, m, l, o) as its state.

Source: post 10017 on kexue.fm (figure 2).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_int
from jaxkit._typing import Array
from jaxkit.attention.streaming._forward_only import forward_only
from jaxkit.attention.streaming.reference import ORDERS

__all__ = ["page_turning"]

State = TypeVar("State")
Step = Callable[[Any, Any], tuple[Any, Any]]

_MESSAGE = (
    "page_turning has no reverse-mode derivative: its loops have no static length. "
    "Differentiate with differentiable=True, or with jax.jvp."
)


def page_turning(
    step: Step,
    *,
    order: str = "newest-first",
    window: int | None = None,
    differentiable: bool = False,
) -> Callable[[Any, Any], Any]:
    """Make of an RNN's step a map over sequences that re-reads the prefix for every output.

    `y_i` is the output of the last of the steps that read `x_i, x_{i−1}, …, x_0` (newest-first) or
    `x_0, …, x_i` (oldest-first) from the initial state: O(L²) steps, and one state held at a time.
    With oldest-first this is what `jax.lax.scan(step, init, xs)` gives in O(L).

    Args:
      step: `(state, x) -> (state, y)`, as for `jax.lax.scan`.
      order: "newest-first" or "oldest-first".
      window: read only the last so many positions.
      differentiable: make as many steps for every output, those beyond its prefix without effect:
        twice the time at a full window, and then reverse mode works.

    Returns:
      `run(init, xs) -> ys`, with positions on the first axis of every leaf of `xs` and `ys`.

    Raises:
      ValueError: unknown order; `window` below 1; reverse mode without `differentiable`.

    Example:
      >>> import jax.numpy as jnp
      >>> run = page_turning(lambda s, x: (10 * s + x, 10 * s + x))
      >>> print(run(jnp.asarray(0), jnp.asarray([1, 2, 3])))
      [  1  21 321]

    Source: post 10017 on kexue.fm.
    """
    check_choice("order", order, ORDERS)
    if window is not None:
        window = check_int("window", window, least=1)

    def run(init: Any, xs: Any) -> Any:
        leaves = jax.tree.leaves(xs)
        if not leaves or any(jnp.ndim(x) == 0 for x in leaves):
            raise ValueError("xs must have arrays with positions on the first axis; got none.")
        lengths = {x.shape[0] for x in leaves}
        if len(lengths) != 1:
            raise ValueError(f"xs must have one length on all first axes; got {sorted(lengths)}.")
        length = lengths.pop()
        if not length:
            raise ValueError("xs must have at least one position; got none.")
        most = length if window is None else min(window, length)
        first = jax.tree.map(lambda x: x[0], xs)
        shape = jax.eval_shape(lambda s, x: step(s, x)[1], init, first)
        blank = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shape)

        def read(state: Any, i: Array, t: Array, count: Array) -> tuple[Any, Any]:
            j = i - t if order == "newest-first" else i + 1 - count + t
            at = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, j, 0, False), xs)
            return step(state, at)

        def output(i: Array) -> Any:
            count = jnp.minimum(i + 1, most)
            if not differentiable:
                turn = lambda t, carry: read(carry[0], i, t, count)
                return jax.lax.fori_loop(0, count, turn, (init, blank))[1]

            def page(carry: tuple[Any, Any], t: Array) -> tuple[tuple[Any, Any], None]:
                keep = lambda: carry
                return jax.lax.cond(t < count, lambda: read(carry[0], i, t, count), keep), None

            steps = jnp.arange(most, dtype=jnp.int32)
            return jax.lax.scan(jax.checkpoint(page), (init, blank), steps)[0][1]

        ys = jax.lax.map(output, jnp.arange(length, dtype=jnp.int32))
        return ys if differentiable else forward_only(ys, _MESSAGE)

    return run
