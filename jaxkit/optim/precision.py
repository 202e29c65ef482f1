"""Mixed precision: which type stores, computes and returns, and constants that are safe in it.

| type     | largest | least normal | least  | spacing at 1 |
|----------|---------|--------------|--------|--------------|
| float16  | 65504   | 6.1e-5       | 6.0e-8 | 9.8e-4       |
| bfloat16 | 3.4e38  | 1.2e-38      |        | 7.8e-3       |
| float32  | 3.4e38  | 1.2e-38      |        | 1.2e-7       |

No policy says how float32 products are formed: GPUs may round their factors to TF32, TPUs to
bfloat16. A baseline in float32 should state its `jax_default_matmul_precision`.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_floating, check_real
from jaxkit._dtypes import wide
from jaxkit._norms import layer_norm, rms_norm
from jaxkit._typing import Array, ArrayLike, Bool, DType, Float
from jaxkit.optim._leaves import path_name

__all__ = [
    "PRESETS",
    "LeafReport",
    "Policy",
    "layer_norm",
    "mask_value",
    "masked_softmax",
    "precision_report",
    "rms_norm",
    "safe_eps",
]

PRESETS: dict[str, str] = {
    "float32": "params=float32",
    "float16-mixed": "params=float32,compute=float16,output=float32",
    "bfloat16-mixed": "params=float32,compute=bfloat16,output=float32",
    "bfloat16": "params=bfloat16",
    "float16": "params=float16",
}

_KEYS = {
    "params": "param_dtype",
    "param": "param_dtype",
    "compute": "compute_dtype",
    "output": "output_dtype",
    "accum": "accum_dtype",
}
_SHORT = {
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "full": "float32",
    "f64": "float64",
}


@dataclasses.dataclass(frozen=True)
class Policy:
    """The types in which parameters are stored, in which a model computes and what it returns.

    Only real floating-point arrays are cast: integers, booleans, complex numbers, random keys and
    `None` go through as they are.

    Args:
      param_dtype: Of stored parameters.
      compute_dtype: Of parameters and inputs inside the model. Default: `param_dtype`.
      output_dtype: Of what the model returns. Default: `compute_dtype`.
      accum_dtype: Of sums, softmax, norms and losses, for code that asks for it.
      path_overrides: Regular expressions and types; parameters whose path (`"block/norm/scale"`)
        one matches are stored, and enter the computation, in that type.

    Raises:
      TypeError: A type is not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> policy = Policy.parse("params=float32,compute=float16,output=float32")
      >>> print(policy.cast_to_compute({"w": jnp.ones(2), "step": jnp.arange(2)}))
      {'step': Array([0, 1], dtype=int32), 'w': Array([1., 1.], dtype=float16)}
      >>> norms = Policy(compute_dtype=jnp.float16, path_overrides={"norm": jnp.float32})
      >>> print(norms.cast_to_compute({"norm": jnp.ones(1), "w": jnp.ones(1)}))
      {'norm': Array([1.], dtype=float32), 'w': Array([1.], dtype=float16)}

    Source: Micikevicius et al. 2018 (arXiv 1710.03740); post 9059.
    """

    param_dtype: DType = jnp.float32
    compute_dtype: DType | None = None
    output_dtype: DType | None = None
    accum_dtype: DType = jnp.float32
    path_overrides: Mapping[str, DType] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        compute = self.param_dtype if self.compute_dtype is None else self.compute_dtype
        chosen = {
            "param_dtype": self.param_dtype,
            "compute_dtype": compute,
            "output_dtype": compute if self.output_dtype is None else self.output_dtype,
            "accum_dtype": self.accum_dtype,
        }
        for name, dtype in chosen.items():
            object.__setattr__(self, name, _floating(name, dtype))
        overrides = {
            pattern: _floating(f"path_overrides[{pattern!r}]", dtype)
            for pattern, dtype in self.path_overrides.items()
        }
        object.__setattr__(self, "path_overrides", overrides)

    def __hash__(self) -> int:
        return hash((str(self), *sorted((k, v.name) for k, v in self.path_overrides.items())))

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """From the name of a preset, or from `"params=float32,compute=float16,output=float32"`.

        Args:
          text: One of `PRESETS`, or types by the keys params, compute, output and accum; `f16`,
            `bf16`, `f32`, `f64`, `half` and `full` are short names.

        Raises:
          ValueError: A key or a type is unknown; the message names it.

        Example:
          >>> print(Policy.parse("bfloat16-mixed"))
          params=float32,compute=bfloat16,output=float32,accum=float32
        """
        if text == "float16":
            warnings.warn(
                "Policy.parse('float16'): steps of less than 2^-12 of a weight are lost. Use it "
                "with sign optimizers, whose steps are not small, or take 'float16-mixed'.",
                stacklevel=2,
            )
        chosen: dict[str, Any] = {}
        for part in PRESETS.get(text, text).split(","):
            key, equals, name = (piece.strip() for piece in part.partition("="))
            if not equals:
                check_choice("policy", text, PRESETS)
            check_choice(f"a key of the policy {text!r}", key, _KEYS)
            if _KEYS[key] in chosen:
                raise ValueError(f"the policy {text!r} must name {key} once.")
            try:
                chosen[_KEYS[key]] = jnp.dtype(_SHORT.get(name, name))
            except TypeError:
                raise ValueError(
                    f"{key} of the policy {text!r} must be a floating-point type; got {name!r}."
                ) from None
        return cls(**chosen)

    def __str__(self) -> str:
        """What `parse` reads, the overrides left out."""
        names = ("param_dtype", "compute_dtype", "output_dtype", "accum_dtype")
        keys = ("params", "compute", "output", "accum")
        return ",".join(
            f"{key}={getattr(self, name).name}" for key, name in zip(keys, names, strict=True)
        )

    def cast_to_param(self, tree: Any) -> Any:
        """Parameters in the type they are stored in."""
        return self._cast(tree, self.param_dtype, self.path_overrides)

    def cast_to_compute(self, tree: Any) -> Any:
        """Parameters or inputs in the type of the computation."""
        return self._cast(tree, self.compute_dtype, self.path_overrides)

    def cast_to_output(self, tree: Any) -> Any:
        """Outputs in their type."""
        return self._cast(tree, self.output_dtype, {})

    def cast_to_accum(self, tree: Any) -> Any:
        """What is to be summed in the type of sums."""
        return self._cast(tree, self.accum_dtype, {})

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose arguments come in the compute type and whose results in the output's.

        Example:
          >>> import jax.numpy as jnp
          >>> print(Policy.parse("float16-mixed").wrap(lambda x: x.dtype)(jnp.ones(1)))
          float16
        """

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # One by one: paths, as `path_overrides` has them, begin inside of an argument.
            args = tuple(map(self.cast_to_compute, args))
            kwargs = {name: self.cast_to_compute(value) for name, value in kwargs.items()}
            return self.cast_to_output(function(*args, **kwargs))

        return wrapped

    def _cast(self, tree: Any, dtype: Any, overrides: Mapping[str, Any]) -> Any:
        def cast(path: tuple[Any, ...], leaf: Any) -> Any:
            own = getattr(leaf, "dtype", None)
            if own is None or not jnp.issubdtype(own, jnp.floating):
                return leaf
            name = path_name(path)
            to = next((to for key, to in overrides.items() if re.search(key, name)), dtype)
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf.update(dtype=to)
            return leaf if own == to else jnp.asarray(leaf, to)

        return jax.tree_util.tree_map_with_path(cast, tree)


def _floating(name: str, dtype: Any) -> Any:
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point type; got {dtype.name}.")
    return dtype


def safe_eps(dtype: DType, eps: float = 1e-8) -> float:
    """An ε that does not vanish in `dtype`: `eps`, but at least 1e-4 in float16.

    In float16, 1e-8 is 0 and 1e-7 is 1.2e-7, whose inverse overflows.

    Args:
      dtype: In which ε is used.
      eps: What it is in float32.

    Returns:
      A Python number.

    Raises:
      TypeError: `dtype` is not floating point.
      ValueError: `eps` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> safe_eps(jnp.float16, 1e-12), safe_eps(jnp.bfloat16, 1e-12)
      (0.0001, 1e-12)

    Source: post 9059.
    """
    dtype = _floating("dtype", dtype)
    check_real("eps", eps, above=0.0)
    least = 1e-4 if dtype == jnp.float16 else float(jnp.finfo(dtype).tiny)
    return max(float(eps), least)


def mask_value(dtype: DType) -> float:
    """What hides a score from a softmax: the least finite number of `dtype`.

    To be put in place, `jnp.where(mask, scores, mask_value(scores.dtype))`. Added, it overflows;
    -1e9 is -inf in float16, and 0 · -1e12 is NaN there.

    Args:
      dtype: Of the scores.

    Returns:
      A Python number.

    Raises:
      TypeError: `dtype` is not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> mask_value(jnp.float16)
      -65504.0

    Source: post 9059.
    """
    return float(jnp.finfo(_floating("dtype", dtype)).min)


def masked_softmax(
    x: Float[Array, "*shape"],
    mask: Bool[Array, "..."],
    *,
    axis: int = -1,
    fully_masked: str = "zeros",
) -> Float[Array, "*shape"]:
    """Softmax over the scores that a mask keeps, computed in float32 at least.

    Args:
      x: Scores.
      mask: True where a score counts, unless it is -inf; broadcast against `x`, which has as many
        axes.
      axis: Over which the probabilities sum to 1.
      fully_masked: What a row without a score is: `zeros` or `uniform`. Its gradient is zero.

    Returns:
      Probabilities in the dtype of `x`; 0 where the mask is False.

    Raises:
      TypeError: `x` is not real floating point or `mask` not boolean.
      ValueError: The shapes do not fit, or a name is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.asarray([[1.0, 1.0, 9.0], [1.0, 2.0, 3.0]], jnp.float16)
      >>> print(masked_softmax(x, jnp.asarray([[True, True, False], [False, False, False]])))
      [[0.5 0.5 0. ]
       [0.  0.  0. ]]
    """
    check_floating("x", x)
    check_choice("fully_masked", fully_masked, ("zeros", "uniform"))
    if jnp.asarray(mask).dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean; got {jnp.asarray(mask).dtype}.")
    fits = mask.ndim == x.ndim and all(
        m in (1, n) for m, n in zip(mask.shape, x.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"mask must have the {x.ndim} axes of x, of its sizes {x.shape} or 1; got {mask.shape}."
        )
    # Two additive masks may have met before this one.
    mask = mask & (x != -jnp.inf)
    some = jnp.any(mask, axis=axis, keepdims=True)
    # A row without scores counts as one of zeros, so that neither it nor its gradient is NaN.
    scores = jnp.where(mask, x.astype(wide(x.dtype)), -jnp.inf)
    scores = jnp.where(some, scores, jnp.zeros_like(scores))
    probabilities = jax.nn.softmax(scores, axis=axis)
    if fully_masked == "zeros":
        probabilities = jnp.where(some, probabilities, jnp.zeros_like(probabilities))
    return probabilities.astype(x.dtype)


class LeafReport(NamedTuple):
    """What a type makes of one array, in float32 at least; shares are of its elements.

    Attributes:
      zeros: Share of zeros.
      subnormals: Share below the least normal number of the dtype, zeros left out.
      non_finite: Share of Inf and NaN.
      largest: Largest finite absolute value.
      absorbed: Share of elements that an update which is not zero leaves as they are; NaN without
        updates.
    """

    zeros: Array
    subnormals: Array
    non_finite: Array
    largest: Array
    absorbed: Array


def precision_report(tree: Any, *, updates: Any = None) -> dict[str, LeafReport]:
    """What is lost of parameters or gradients in the type they have; for jit as well.

    Args:
      tree: Parameters or gradients; leaves that are not floating point are left out.
      updates: What is to be added to them, of the same structure: how much of it rounding eats.

    Returns:
      A report for each leaf, by its path.

    Raises:
      ValueError: `updates` has another structure or another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = {"w": jnp.asarray([1.0, 2049.0, 0.0, 1e-7], jnp.float16)}
      >>> report = precision_report(weights, updates={"w": jnp.full(4, 1e-4)})["w"]
      >>> print(report.zeros, report.subnormals, report.largest, report.absorbed)
      0.25 0.25 2048.0 0.5
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    steps: list[Any] = [None] * len(pairs)
    if updates is not None:
        structure: Any = jax.tree.structure(updates)
        if structure != treedef:
            raise ValueError(
                f"updates must have the structure of tree, {treedef}; got {structure}."
            )
        steps = jax.tree.leaves(updates)
    return {
        path_name(path): _leaf_report(path_name(path), jnp.asarray(leaf), step)
        for (path, leaf), step in zip(pairs, steps, strict=True)
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
    }


def _leaf_report(name: str, x: Array, step: ArrayLike | None) -> LeafReport:
    accumulate = wide(x.dtype)
    share = lambda which: jnp.mean(which, dtype=accumulate) if x.size else jnp.asarray(jnp.nan)
    # By the bits: arithmetic may take subnormal numbers for zero.
    info = jnp.finfo(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{info.bits}"))
    magnitude = bits & jnp.asarray((1 << (info.bits - 1)) - 1, bits.dtype)
    subnormal = (magnitude > 0) & (magnitude < jnp.asarray(1 << info.nmant, bits.dtype))
    finite = jnp.isfinite(x)
    sizes = jnp.where(finite, jnp.abs(x), jnp.zeros_like(x)).astype(accumulate)
    largest = jnp.max(sizes, initial=0)
    absorbed = jnp.asarray(jnp.nan, accumulate)
    if step is not None:
        step = jnp.asarray(step)
        if step.shape != x.shape:
            raise ValueError(f"updates at {name!r} must have shape {x.shape}; got {step.shape}.")
        # As optax.apply_updates adds: in the wider of the two types, then rounded.
        wider = wide(x.dtype, step.dtype)
        added = (x.astype(wider) + step.astype(wider)).astype(x.dtype)
        absorbed = share((added == x) & (step != 0))
    return LeafReport(share(magnitude == 0), share(subnormal), share(~finite), largest, absorbed)
