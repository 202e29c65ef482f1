"""Recurrent cells with a HiPPO memory: HiPPO-RNN and the Legendre Memory Unit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkit._checks import check_axis, check_choice, check_floating, check_int, check_real
from jaxkit._typing import Array, DType, Float
from jaxkit.ssm.discretize import LTI_METHODS, discretize
from jaxkit.ssm.hippo._common import HIGHEST
from jaxkit.ssm.hippo.legs import LEGS_METHODS, legs_step
from jaxkit.ssm.hippo.measures import SCALED_MEASURES, check_measure, transition

__all__ = ["HippoCell", "HippoMemory", "HippoState", "LMUCell"]

_CELLS = ("gru", "lstm", "simple")
_CELL_MEASURES = ("legs", "legt", "lmu", "lagt", "fout", "fout_post")


class HippoState(NamedTuple):
    """State of a cell: hidden carry, memories `[..., memories, state]`, samples seen (int32)."""

    hidden: Any
    memory: Array
    steps: Array


class HippoMemory(nnx.Module):
    """Independent HiPPO memories of several scalar signals, updated by one sample at a time.

    `c ← Ā c + B̄ u` for a measure with a window, with its own step Δ for every memory; for `legs`
    the update in O(N) with the time taken from the count of samples.

    Args:
      memories: number of signals.
      N: states of one memory; odd for `fout`.
      measure: `legs`, `legt`, `lmu`, `lagt`, `fout` or `fout_post`.
      method: discretization; default `bilinear` for `legs`, `zoh` for the others.
      dt: initial step in units of time. `legs` does not depend on it.
      window: window in units of time; the others than `legs` need it.
      decay: β of `lagt`.
      alpha: implicit weight of the `gbt` methods.
      learn_step: make log Δ a parameter `log_step` `[memories]`.
      unsafe: allow forward Euler on `legs` above N = 16.

    Raises:
      TypeError: an argument is not of the kind asked for.
      ValueError: an argument out of range; no `window` for a measure with one; `learn_step` for
        `legs`, whose step cancels.

    Example:
      >>> import jax.numpy as jnp
      >>> memory = HippoMemory(2, 4, measure="legt", window=8.0)
      >>> c = memory.step(memory.system(), jnp.zeros((2, 4)), jnp.ones(2), jnp.asarray(0))
      >>> c.shape
      (2, 4)

    Source: Gu et al. 2020 (arXiv 2008.07669), section 2; learnable Δ as in Gu et al. 2021
    (arXiv 2110.13985).
    """

    def __init__(
        self,
        memories: int,
        N: int,
        *,
        measure: str = "legs",
        method: str | None = None,
        dt: float = 1.0,
        window: float | None = None,
        decay: float = 1.0,
        alpha: float = 0.5,
        learn_step: bool = False,
        unsafe: bool = False,
        param_dtype: DType = jnp.float32,
    ):
        self.memories = check_int("memories", memories, least=1)
        check_choice("measure", measure, _CELL_MEASURES)
        self.N = check_measure(measure, N)
        self.measure = measure
        self.alpha = float(check_real("alpha", alpha, least=0.0, most=1.0))
        self.unsafe = bool(unsafe)
        self.dtype = param_dtype
        dt = float(check_real("dt", dt, above=0.0))
        scaled = measure in SCALED_MEASURES
        self.method = ("bilinear" if scaled else "zoh") if method is None else method
        check_choice("method", self.method, LEGS_METHODS if scaled else LTI_METHODS)
        if scaled:
            if learn_step:
                raise ValueError(
                    f"learn_step must be False for measure {measure!r}, whose step cancels."
                )
            # Raises for forward Euler here rather than in the first step.
            self._legs(jnp.zeros(self.N), jnp.zeros(()), 1.0, 2.0)
        elif window is None:
            raise ValueError(f"window must be given for measure {measure!r}, in units of time.")
        self.window = 1.0 if window is None else float(check_real("window", window, above=0.0))
        self.decay = float(check_real("decay", decay, least=0.0, most=1.0))
        self.dt = dt
        self.log_step = (
            nnx.Param(jnp.full(self.memories, np.log(dt), param_dtype)) if learn_step else None
        )

    def _legs(self, c: Array, u: Array, t: Any, t_next: Any) -> Array:
        return legs_step(
            c,
            u,
            t,
            t_next,
            method=self.method,
            alpha=self.alpha,
            form="associative",
            unsafe=self.unsafe,
        )

    def init_state(self, batch_shape: tuple[int, ...] = ()) -> Array:
        """Empty memories, `[*batch_shape, memories, state]`."""
        return jnp.zeros((*batch_shape, self.memories, self.N), self.dtype)

    def system(self) -> tuple[Array, Array] | None:
        """`(Ā, B̄)`, `[memories, state, state]` and `[memories, state]`; None for `legs`.

        Compute it once for a whole sequence and hand it to every `step`.
        """
        if self.measure in SCALED_MEASURES:
            return None
        A, B = transition(self.measure, self.N, window=self.window, decay=self.decay)
        if self.log_step is not None:
            step = jnp.exp(self.log_step[...])
            return discretize(A, B, step, method=self.method, alpha=self.alpha)
        A, B = discretize(A, B, self.dt, method=self.method, alpha=self.alpha)
        return jnp.asarray(A, self.dtype)[None], jnp.asarray(B, self.dtype)[None]

    def step(
        self,
        system: tuple[Array, Array] | None,
        c: Float[Array, "*batch memories state"],
        u: Float[Array, "*batch memories"],
        count: Array,
    ) -> Float[Array, "*batch memories state"]:
        """Memories after one more sample `u` of every signal; `count` samples came before."""
        u = u.astype(c.dtype)
        if system is None:
            done = count.astype(c.dtype)
            return self._legs(c, u, done, done + 1)
        A_bar, B_bar = system
        flat = c.reshape(-1, self.memories, self.N)
        A_bar = jnp.broadcast_to(A_bar, (self.memories, self.N, self.N))
        moved = jnp.einsum("bmk,mnk->bmn", flat, A_bar, precision=HIGHEST)
        return moved.reshape(c.shape) + u[..., None] * jnp.expand_dims(B_bar, range(c.ndim - 2))


class _MemoryCell(nnx.Module):
    """Scan over a sequence for a cell with `init_state`, and `_step` under a fixed system."""

    in_features: int
    memory: HippoMemory

    def init_state(self, batch_shape: tuple[int, ...] = ()) -> HippoState:
        raise NotImplementedError

    def _step(self, system: Any, state: HippoState, x: Array) -> tuple[Array, HippoState]:
        raise NotImplementedError

    def _check(self, x: Any, least: int) -> Array:
        x = jnp.asarray(x)
        check_floating("x", x)
        check_axis("x", x, -1, self.in_features, "features")
        if x.ndim < least or (least == 2 and x.shape[-2] < 1):
            raise ValueError(
                "x must be [..., length, features] with length at least 1; "
                f"got shape {tuple(x.shape)}."
            )
        return x

    def step(self, state: HippoState, x: Float[Array, "*batch dim"]) -> tuple[Array, HippoState]:
        """One time step: `(hidden output [..., hidden], new state)`."""
        return self._step(self.memory.system(), state, self._check(x, 1))

    def scan(
        self, x: Float[Array, "*batch length dim"], state: HippoState | None = None
    ) -> tuple[Array, HippoState]:
        """All time steps of a sequence: `(outputs [..., length, hidden], last state)`.

        Splitting a sequence and handing on the state gives the same outputs.
        """
        x = self._check(x, 2)
        if state is None:
            state = self.init_state(x.shape[:-2])
        system = self.memory.system()

        def body(carry, x_k):
            y, carry = self._step(system, carry, x_k)
            return carry, y

        last, ys = jax.lax.scan(body, state, jnp.moveaxis(x, -2, 0))
        return jnp.moveaxis(ys, 0, -2), last


class HippoCell(_MemoryCell):
    """HiPPO-RNN: a recurrent cell that reads a memory of its own output's past.

    `h_t = cell(h_{t−1}, [x_t, c_{t−1}])`, `u_t = W h_t`, `c_t = memory update of c_{t−1} by u_t`.

    Args:
      in_features: features of one input.
      hidden_features: size of h.
      N: states of one memory.
      memories: number of signals u (each has its own copy of the memory).
      cell: `gru`, `lstm` or `simple`.
      measure, method, dt, window, decay, alpha, learn_step, unsafe: see `HippoMemory`.
      param_dtype: dtype of the parameters and of the state.
      rngs: randomness for the initial weights.

    Raises:
      TypeError, ValueError: see `HippoMemory`; unknown `cell`; inputs of another width.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> cell = HippoCell(3, 8, 16, rngs=nnx.Rngs(0))
      >>> ys, state = cell.scan(jnp.ones((2, 5, 3)))
      >>> y, state = cell.step(state, jnp.ones((2, 3)))
      >>> ys.shape, y.shape, int(state.steps)
      ((2, 5, 8), (2, 8), 6)

    Source: Gu, Dao, Ermon, Rudra, Ré 2020 (arXiv 2008.07669), section 2.5 and appendix F.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        N: int,
        *,
        memories: int = 1,
        cell: str = "gru",
        measure: str = "legs",
        method: str | None = None,
        dt: float = 1.0,
        window: float | None = None,
        decay: float = 1.0,
        alpha: float = 0.5,
        learn_step: bool = False,
        unsafe: bool = False,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features = check_int("in_features", in_features, least=1)
        self.hidden_features = check_int("hidden_features", hidden_features, least=1)
        check_choice("cell", cell, _CELLS)
        self.memory = HippoMemory(
            memories,
            N,
            measure=measure,
            method=method,
            dt=dt,
            window=window,
            decay=decay,
            alpha=alpha,
            learn_step=learn_step,
            unsafe=unsafe,
            param_dtype=param_dtype,
        )
        kind = {"gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell, "simple": nnx.SimpleCell}[cell]
        self.kind = cell
        self.dtype = param_dtype
        self.cell = kind(
            self.in_features + self.memory.memories * self.memory.N,
            self.hidden_features,
            dtype=param_dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.write = nnx.Linear(
            self.hidden_features,
            self.memory.memories,
            use_bias=False,
            dtype=param_dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def init_state(self, batch_shape: tuple[int, ...] = ()) -> HippoState:
        """Zero hidden carry, empty memories, no steps taken."""
        h = jnp.zeros((*batch_shape, self.hidden_features), self.dtype)
        return HippoState(
            (h, h) if self.kind == "lstm" else h,
            self.memory.init_state(batch_shape),
            jnp.zeros((), jnp.int32),
        )

    def _step(self, system: Any, state: HippoState, x: Array) -> tuple[Array, HippoState]:
        c = state.memory
        read = c.reshape(*c.shape[:-2], c.shape[-2] * c.shape[-1])
        inputs = jnp.concatenate([x.astype(self.dtype), read], axis=-1)
        hidden, h = self.cell(state.hidden, inputs)
        c = self.memory.step(system, c, self.write(h), state.steps)
        return h.astype(x.dtype), HippoState(hidden, c, state.steps + 1)


class LMUCell(_MemoryCell):
    """Legendre Memory Unit: the memory is written from input, hidden state and memory.

    `u = e_x·x + e_h·h + e_m·m`, `m ← Ā m + B̄ u`, `h ← tanh(W_x x + W_h h + W_m m)` with the new m.
    The measure is `lmu`: m holds the last `window` in Legendre polynomials of the delay.

    Args:
      in_features: features of one input.
      hidden_features: size of h.
      N: states of one memory.
      window: window θ in units of time.
      memories: number of signals u.
      dt, method, learn_step: see `HippoMemory`.
      param_dtype: dtype of the parameters and of the state.
      rngs: randomness for the initial weights (e_m starts at zero, as in the paper).

    Raises:
      TypeError, ValueError: see `HippoMemory`; inputs of another width.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> cell = LMUCell(3, 8, 6, window=20.0, rngs=nnx.Rngs(0))
      >>> ys, state = cell.scan(jnp.ones((2, 5, 3)))
      >>> ys.shape, state.memory.shape
      ((2, 5, 8), (2, 1, 6))

    Source: Voelker, Kajić, Eliasmith 2019, "Legendre Memory Units" (NeurIPS).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        N: int,
        *,
        window: float,
        memories: int = 1,
        dt: float = 1.0,
        method: str = "zoh",
        learn_step: bool = False,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features = check_int("in_features", in_features, least=1)
        self.hidden_features = check_int("hidden_features", hidden_features, least=1)
        self.memory = HippoMemory(
            memories,
            N,
            measure="lmu",
            method=method,
            dt=dt,
            window=window,
            learn_step=learn_step,
            param_dtype=param_dtype,
        )
        self.dtype = param_dtype
        flat = self.memory.memories * self.memory.N

        def dense(features, outputs, init):
            return nnx.Linear(
                features,
                outputs,
                use_bias=False,
                kernel_init=init,
                dtype=param_dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        lecun, xavier = nnx.initializers.lecun_uniform(), nnx.initializers.xavier_normal()
        self.write_x = dense(self.in_features, self.memory.memories, lecun)
        self.write_h = dense(self.hidden_features, self.memory.memories, lecun)
        self.write_m = dense(flat, self.memory.memories, nnx.initializers.zeros_init())
        self.read_x = dense(self.in_features, self.hidden_features, xavier)
        self.read_h = dense(self.hidden_features, self.hidden_features, xavier)
        self.read_m = dense(flat, self.hidden_features, xavier)

    def init_state(self, batch_shape: tuple[int, ...] = ()) -> HippoState:
        """Zero hidden state, empty memories, no steps taken."""
        return HippoState(
            jnp.zeros((*batch_shape, self.hidden_features), self.dtype),
            self.memory.init_state(batch_shape),
            jnp.zeros((), jnp.int32),
        )

    def _step(self, system: Any, state: HippoState, x: Array) -> tuple[Array, HippoState]:
        def flatten(m):
            return m.reshape(*m.shape[:-2], m.shape[-2] * m.shape[-1])

        inputs, h = x.astype(self.dtype), state.hidden
        u = self.write_x(inputs) + self.write_h(h) + self.write_m(flatten(state.memory))
        m = self.memory.step(system, state.memory, u, state.steps)
        h = jnp.tanh(self.read_x(inputs) + self.read_h(h) + self.read_m(flatten(m)))
        return h.astype(x.dtype), HippoState(h, m, state.steps + 1)
