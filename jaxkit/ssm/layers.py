"""`flax.nnx` layers over the pure functions of `jaxkit.ssm`.

Every layer maps `[..., length, heads]` to the same shape and offers the same recurrent protocol,

    system = layer.discretize()                    # once, outside the loop
    state = layer.init_state(batch_shape)
    y, state = layer.step(state, u, system=system)         # u [..., heads]
    y, state = layer.prefill(state, u, system=system)      # u [..., length, heads]

so that it scans and jits, and any mixture of prefill and steps gives what the convolution gives.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkit._checks import check_choice, check_int
from jaxkit._typing import Array, DType, Float, Params
from jaxkit.ssm import rtf, s4, s4d, s5
from jaxkit.ssm._modes import check_sequence
from jaxkit.ssm.conv import fft_conv, fft_conv_bidirectional

__all__ = ["S4", "S5", "FrozenSSMParam", "Recurrent", "SSMParam"]

KERNELS: dict[str, ModuleType] = {"dplr": s4, "diag": s4d, "rtf": rtf}


class SSMParam(nnx.Param):
    """Λ, P, B and the steps: trained at a smaller rate, without weight decay (`ssm_labels`)."""


class FrozenSSMParam(nnx.Variable):
    """Λ, P and B of a layer that keeps its initial ones; no `nnx.Param`, so not trained."""


# Names that `jaxkit.ssm.rates.ssm_labels` gives the smaller rate.
DYNAMICS = ("log_neg_re", "im", "p", "b")


class S4(nnx.Module):
    """A structured state-space layer: one linear system for each channel.

    `y = K * u + D u` with the kernel K of `jaxkit.ssm.s4`, `s4d` or `rtf`, causal or
    bidirectional. No mixing of channels, no nonlinearity: see `jaxkit.ssm.model.SequenceBlock`.

    Args:
      heads: Number of channels H.
      state_size: N of each channel, even (real spectra and `rtf`: any).
      kernel: `dplr` (S4), `diag` (S4D, DSS) or `rtf` (rational transfer function).
      init: Name of the initialisation, or for `dplr` and `diag` a `DPLR` or `Diagonal` tuple.
        Default: `legs`, for `rtf` its own.
      l_max: The length at which C̃ (dplr), the softmax (diag) or the coefficients (rtf) are
        defined: the longest sequence. Required by those three, unused otherwise.
      bidirectional: Add a kernel that reads the future.
      discretization: Of `diag`: `zoh`, `bilinear` or `softmax`.
      stability: How Re Λ < 0 is kept: `exp`, `softplus` or `relu`.
      n_ssm: Number of different (Λ, P, B). Default: one for each channel.
      dt_min: Smallest initial step; up to 1/length.
      dt_max: Largest initial step.
      tie_step: One step for each channel, or one for each mode.
      halve_input: B/2 for `diag` with `legs`.
      frozen: Keep Λ, P and B as they are initialised.
      band_limit: Zero C where ε|Im Λ|/2π ≥ ½ · band_limit.
      constraint: Of `rtf`: `l1` keeps every pole inside the unit disc.
      feedthrough: Of `rtf`: the paper's form with h_0.
      implementation: Of the kernel; see `jaxkit_kernels`.
      dtype: float32 or float64.
      rngs: Random keys; `params` is used.

    Raises:
      ValueError: If an argument is out of range or does not go with `kernel`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = S4(4, 8, l_max=16, rngs=nnx.Rngs(0))
      >>> u = jnp.ones((2, 16, 4))
      >>> y, state = layer.prefill(layer.init_state((2,)), u)
      >>> print(layer(u).shape, bool(abs(layer(u) - y).max() < 1e-3))
      (2, 16, 4) True

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396); posts 10162 and 10180.
    """

    def __init__(
        self,
        heads: int,
        state_size: int,
        *,
        kernel: str = "dplr",
        init: Any = None,
        l_max: int | None = None,
        bidirectional: bool = False,
        discretization: str = "zoh",
        stability: str = "exp",
        n_ssm: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        tie_step: bool = True,
        halve_input: bool = False,
        frozen: bool = False,
        band_limit: float | None = None,
        constraint: str | None = None,
        feedthrough: bool = True,
        implementation: Any = "auto",
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_choice("kernel", kernel, KERNELS)
        check_choice("discretization", discretization, s4d.DISCRETIZATIONS)
        self.heads = check_int("heads", heads, least=1)
        self.state_size = check_int("state_size", state_size, least=1)
        self.kernel_name = kernel
        self.l_max = None if l_max is None else check_int("l_max", l_max, least=1)
        self.bidirectional = bidirectional
        self.discretization = discretization
        self.stability = stability
        self.band_limit = band_limit
        self.implementation = implementation
        self.dtype = jnp.dtype(dtype)
        self._needs_l_max()
        if halve_input and kernel != "diag":
            raise ValueError(f"halve_input applies to kernel 'diag'; got kernel {kernel!r}.")

        common: dict[str, Any] = {"dtype": dtype}
        if kernel != "rtf":
            common |= {
                "init": "legs" if init is None else init,
                "stability": stability,
                "n_ssm": n_ssm,
                "dt_min": dt_min,
                "dt_max": dt_max,
                "tie_step": tie_step,
            }
        else:
            common |= {"constraint": constraint, "feedthrough": feedthrough}
            common |= {} if init is None else {"init": init}
        if kernel != "diag":
            common["l_max"] = self.l_max
        if kernel == "diag":
            common["halve_input"] = halve_input
        family = KERNELS[kernel]
        params = family.init_params(rngs.params(), heads, state_size, **common)
        self.names = tuple(params)
        for name, value in params.items():
            setattr(self, name, self._variable(name, frozen)(value))
        self.backward_names: tuple[str, ...] = ()
        if bidirectional:
            # The backward kernel shares Λ, P, B and ε: its own read-out makes it another system.
            other = self._own_read_out(family, rngs, common, params)
            self.backward_names = tuple(other)
            for name, value in other.items():
                setattr(self, f"{name}_backward", nnx.Param(value))

    def _variable(self, name: str, frozen: bool) -> type[nnx.Variable]:
        if self.kernel_name == "rtf":
            return nnx.Param
        if name in DYNAMICS:
            return FrozenSSMParam if frozen else SSMParam
        return SSMParam if name == "log_step" else nnx.Param

    def _needs_l_max(self) -> None:
        softmax = self.kernel_name == "diag" and self.discretization == "softmax"
        if self.l_max is None and (self.kernel_name != "diag" or softmax):
            what = "softmax" if softmax else self.kernel_name
            raise ValueError(f"l_max must be given for {what!r}: the longest sequence; got None.")

    def _own_read_out(
        self, family: ModuleType, rngs: nnx.Rngs, common: dict[str, Any], params: Params
    ) -> Params:
        fresh = family.init_params(rngs.params(), self.heads, self.state_size, **common)
        if self.kernel_name == "rtf":
            return {name: value for name, value in fresh.items() if name != "d"}
        if self.kernel_name == "diag":
            return {"c": fresh["c"]}
        own = s4.from_truncated(fresh, length=self.l_max or 1, stability=self.stability)
        mixed = s4.to_truncated(
            {**params, "c": own["c"]}, length=self.l_max or 1, stability=self.stability
        )
        return {"c": mixed["c"]}

    def params(self, *, backward: bool = False) -> Params:
        """The parameter dict that the pure functions take."""
        values = {name: getattr(self, name)[...] for name in self.names}
        if backward:
            values |= {name: getattr(self, f"{name}_backward")[...] for name in self.backward_names}
        return values

    def _options(self) -> dict[str, Any]:
        if self.kernel_name == "rtf":
            return {"l_max": self.l_max}
        options: dict[str, Any] = {
            "l_max": self.l_max,
            "stability": self.stability,
            "band_limit": self.band_limit,
        }
        if self.kernel_name == "diag":
            options["discretization"] = self.discretization
        return options

    def kernel(
        self, length: int, *, rate: Any = 1.0, backward: bool = False
    ) -> Float[Array, "heads length"]:
        """The convolution kernel of `length` steps, without D."""
        if backward and not self.bidirectional:
            raise ValueError("backward needs a bidirectional layer; got bidirectional=False.")
        family = KERNELS[self.kernel_name]
        options = self._options()
        if self.kernel_name != "rtf":
            options["implementation"] = self.implementation
        return family.kernel(self.params(backward=backward), length, rate=rate, **options)

    def __call__(
        self, u: Float[Array, "*batch length heads"], *, rate: Any = 1.0
    ) -> Float[Array, "*batch length heads"]:
        """Convolve.

        Args:
          u: Input, real.
          rate: The sampling rate ratio: 2 for the same signals with half as many samples.

        Returns:
          The output, in the dtype of `u`.

        Raises:
          TypeError: If `u` is not real.
          ValueError: If `u` has another number of channels, or is longer than `l_max`.
        """
        check_sequence("u", u, self.heads, axes=2)
        length = u.shape[-2]
        forward = self.kernel(length, rate=rate)
        skip = self.params()["d"]
        if not self.bidirectional:
            return fft_conv(u, forward, skip=skip)
        backward = self.kernel(length, rate=rate, backward=True)
        return fft_conv_bidirectional(u, forward, backward, skip=skip)

    def _causal(self) -> None:
        if self.bidirectional:
            raise ValueError(
                "bidirectional must be False for step, prefill and discretize: a layer that reads "
                "the future has no recurrence; got True."
            )

    def discretize(self, *, rate: Any = 1.0) -> Any:
        """The recurrence (a pytree), to be derived once and passed to `step` and `prefill`.

        Raises:
          ValueError: If the layer is bidirectional.
        """
        self._causal()
        return KERNELS[self.kernel_name].discretize(self.params(), rate=rate, **self._options())

    def init_state(self, batch_shape: tuple[int, ...] = ()) -> Array:
        """The zero state, `[*batch_shape, heads, …]`.

        Raises:
          ValueError: If the layer is bidirectional.
        """
        self._causal()
        options: dict[str, Any] = {"batch_shape": tuple(batch_shape), "dtype": self.dtype}
        if self.kernel_name == "diag":
            options["real"] = "im" not in self.names
        return KERNELS[self.kernel_name].init_state(self.heads, self.state_size, **options)

    def step(
        self, state: Array, u: Float[Array, "*batch heads"], *, system: Any = None
    ) -> tuple[Float[Array, "*batch heads"], Array]:
        """One step; `system` from `discretize` (derived anew if not given).

        Raises:
          ValueError: If the layer is bidirectional or shapes do not fit.
        """
        self._causal()
        system = self.discretize() if system is None else system
        return KERNELS[self.kernel_name].step(system, state, u)

    def prefill(
        self, state: Array, u: Float[Array, "*batch length heads"], *, system: Any = None
    ) -> tuple[Float[Array, "*batch length heads"], Array]:
        """Many steps at once from any state, with the exact state after them.

        Raises:
          ValueError: If the layer is bidirectional or shapes do not fit.
        """
        self._causal()
        system = self.discretize() if system is None else system
        return KERNELS[self.kernel_name].prefill(system, state, u)


class S5(nnx.Module):
    """One linear system for all channels (MIMO), run as a parallel scan.

    Args:
      heads: Number of channels H.
      state_size: N of the whole layer.
      blocks: LegS blocks J of the initial spectrum; N/J even.
      bidirectional: Add a scan from the end.
      discretization: `zoh` or `bilinear`.
      stability: How Re Λ < 0 is kept: `exp`, `softplus` or `relu`.
      dt_min: Smallest initial step.
      dt_max: Largest initial step.
      chunk_size: Scan in chunks of this many steps, for memory.
      dtype: float32 or float64.
      rngs: Random keys; `params` is used.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = S5(4, 8, rngs=nnx.Rngs(0))
      >>> print(layer(jnp.ones((2, 5, 4))).shape)
      (2, 5, 4)

    Source: Smith, Warrington, Linderman 2022 (arXiv 2208.04933).
    """

    def __init__(
        self,
        heads: int,
        state_size: int,
        *,
        blocks: int = 1,
        bidirectional: bool = False,
        discretization: str = "zoh",
        stability: str = "exp",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        chunk_size: int | None = None,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_choice("discretization", discretization, s5.DISCRETIZATIONS)
        self.heads = check_int("heads", heads, least=1)
        self.state_size = check_int("state_size", state_size, least=1)
        self.bidirectional = bidirectional
        self.discretization = discretization
        self.stability = stability
        self.chunk_size = chunk_size
        self.dtype = jnp.dtype(dtype)
        params = s5.init_params(
            rngs.params(),
            heads,
            state_size,
            blocks=blocks,
            dt_min=dt_min,
            dt_max=dt_max,
            bidirectional=bidirectional,
            stability=stability,
            dtype=dtype,
        )
        self.names = tuple(params)
        for name, value in params.items():
            slow = name in DYNAMICS or name == "log_step"
            setattr(self, name, (SSMParam if slow else nnx.Param)(value))

    def params(self) -> Params:
        """The parameter dict that the pure functions take."""
        return {name: getattr(self, name)[...] for name in self.names}

    def _options(self) -> dict[str, Any]:
        return {"discretization": self.discretization, "stability": self.stability}

    def __call__(
        self, u: Float[Array, "*batch length heads"], *, rate: Any = 1.0, steps: Array | None = None
    ) -> Float[Array, "*batch length heads"]:
        """Scan; `steps` are the durations of irregular samples, in units of the layer's step.

        Raises:
          TypeError: If `u` is not real.
          ValueError: If shapes do not fit.
        """
        return s5.apply(
            self.params(), u, steps=steps, rate=rate, chunk_size=self.chunk_size, **self._options()
        )

    def _causal(self) -> None:
        if self.bidirectional:
            raise ValueError(
                "bidirectional must be False for step, prefill and discretize: a layer that reads "
                "the future has no recurrence; got True."
            )

    def discretize(self, *, rate: Any = 1.0) -> Any:
        """The recurrence (a pytree), to be derived once and passed to `step` and `prefill`.

        Raises:
          ValueError: If the layer is bidirectional.
        """
        self._causal()
        return s5.discretize(self.params(), rate=rate, **self._options())

    def init_state(self, batch_shape: tuple[int, ...] = ()) -> Array:
        """The zero state, `[*batch_shape, modes]`.

        Raises:
          ValueError: If the layer is bidirectional.
        """
        self._causal()
        return s5.init_state(self.state_size, batch_shape=tuple(batch_shape), dtype=self.dtype)

    def step(self, state: Array, u: Array, *, system: Any = None) -> tuple[Array, Array]:
        """One step; `system` from `discretize` (derived anew if not given).

        Raises:
          ValueError: If the layer is bidirectional or shapes do not fit.
        """
        self._causal()
        return s5.step(self.discretize() if system is None else system, state, u)

    def prefill(self, state: Array, u: Array, *, system: Any = None) -> tuple[Array, Array]:
        """Many steps at once from any state, with the exact state after them.

        Raises:
          ValueError: If the layer is bidirectional or shapes do not fit.
        """
        self._causal()
        system = self.discretize() if system is None else system
        return s5.prefill(system, state, u, chunk_size=self.chunk_size)


class Recurrent(nnx.Module):
    """An LSTM (forget bias 1) or a GRU in the place of a state-space layer.

    Args:
      heads: Width of input, state and output.
      cell: `lstm` or `gru`.
      dtype: float32 or float64.
      rngs: Random keys.

    Raises:
      ValueError: If `cell` is unknown or `heads` below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = Recurrent(4, cell="gru", rngs=nnx.Rngs(0))
      >>> print(layer(jnp.ones((2, 5, 4))).shape)
      (2, 5, 4)

    Source: Hochreiter, Schmidhuber 1997; Cho et al. 2014 (arXiv 1406.1078).
    """

    def __init__(
        self, heads: int, *, cell: str = "gru", dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        check_choice("cell", cell, ("lstm", "gru"))
        self.heads = check_int("heads", heads, least=1)
        self.dtype = jnp.dtype(dtype)
        self.bidirectional = False
        if cell == "gru":
            self.cell: Any = nnx.GRUCell(heads, heads, param_dtype=dtype, rngs=rngs)
        else:
            lstm = nnx.OptimizedLSTMCell(heads, heads, param_dtype=dtype, rngs=rngs)
            # Gates are stacked as input, forget, cell, output.
            bias = lstm.dense_h.bias
            assert bias is not None
            bias[...] = bias[...].at[heads : 2 * heads].set(1.0)
            self.cell = lstm

    def discretize(self, *, rate: Any = 1.0) -> tuple[()]:
        """Nothing to derive; a gated cell has no sampling rate.

        Raises:
          ValueError: If `rate` is not 1.
        """
        if not (isinstance(rate, int | float) and rate == 1):
            raise ValueError(f"rate must be 1 for a recurrent cell; got {rate!r}.")
        return ()

    def init_state(self, batch_shape: tuple[int, ...] = ()) -> Any:
        """The zero carry."""
        zeros = jnp.zeros((*batch_shape, self.heads), self.dtype)
        return zeros if isinstance(self.cell, nnx.GRUCell) else (zeros, zeros)

    def step(self, state: Any, u: Array, *, system: Any = None) -> tuple[Array, Any]:
        """One step."""
        state, y = self.cell(state, u)
        return y, state

    def prefill(self, state: Any, u: Array, *, system: Any = None) -> tuple[Array, Any]:
        """A scan over steps."""
        graph, values = nnx.split(self.cell)

        def body(carry, x):
            return nnx.merge(graph, values)(carry, x)

        state, y = jax.lax.scan(body, state, jnp.moveaxis(u, -2, 0))
        return jnp.moveaxis(y, 0, -2), state

    def __call__(self, u: Array, *, rate: Any = 1.0) -> Array:
        """All outputs from the zero state.

        Raises:
          ValueError: If `u` has another number of channels or `rate` is not 1.
        """
        check_sequence("u", u, self.heads, axes=2)
        self.discretize(rate=rate)
        return self.prefill(self.init_state(u.shape[:-2]), u)[0]
