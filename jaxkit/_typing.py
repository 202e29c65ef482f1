"""Array types, and the letters used for axes throughout the toolkit.

One name is one axis everywhere:

| name       | axis                                                      |
|------------|-----------------------------------------------------------|
| `batch`    | independent examples                                      |
| `length`   | positions in a sequence (time steps)                      |
| `heads`    | independent channels, or attention heads                  |
| `dim`      | features of one position                                  |
| `state`    | real or complex coordinates of a linear state (N)         |
| `modes`    | one member of each conjugate pair of a state (M = N / 2)  |
| `rank`     | columns of a low-rank term                                |
| `codes`    | entries of a codebook                                     |
"""

from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int

__all__ = ["Array", "ArrayLike", "Bool", "Complex", "DType", "Float", "Int", "Key", "Params"]

ArrayLike: TypeAlias = jax.typing.ArrayLike | np.ndarray
DType: TypeAlias = Any
Key: TypeAlias = Array
Params: TypeAlias = dict[str, Array]
