"""Exact costs of the ways to decode an N-layer attention model: key visits, blocks, numbers kept.

With p tokens visible, layer n reads p keys, and without a cache each is made anew by layer n − 1:

    A_n(p) = Σ_{j≤p} (1 + A_{n−1}(j)) = C(p+n, n) − 1,        E_n(p) = C(p+n−1, n−1),

A counts key visits, E block (projection and MLP) evaluations. All are exact Python integers.

Source: post 10017 on kexue.fm.
"""

import itertools
import math

from jaxkit._checks import check_choice, check_int

__all__ = [
    "MODES",
    "block_evaluations",
    "check_group",
    "frame_numbers",
    "kept_numbers",
    "key_visits",
    "mode_visits",
    "post_state_size",
    "total_visits",
    "windowed_visits",
]

MODES = ("kv_cache", "input_cache", "layerwise", "grouped", "recompute")


def key_visits(layers: int, visible: int) -> int:
    """`A_n(p) = C(p+n, n) − 1`: key visits for one token of an n-layer model without any cache.

    Args:
      layers: n, at least 0.
      visible: p = i + 1, the tokens that the newest one sees, at least 0.

    Returns:
      The number of pairs (query, key) that are scored.

    Raises:
      ValueError: an argument is negative.

    Example:
      >>> [key_visits(2, p) for p in range(1, 8)], key_visits(4, 1024)
      ([2, 5, 9, 14, 20, 27, 35], 46261908224)
    """
    layers = check_int("layers", layers, least=0)
    visible = check_int("visible", visible, least=0)
    return math.comb(visible + layers, layers) - 1


def block_evaluations(layers: int, visible: int) -> int:
    """`E_n(p) = C(p+n−1, n−1)`: how often any layer's block is evaluated for one token.

    Args:
      layers: n, at least 0; without layers there is no block.
      visible: p, at least 1.

    Returns:
      The number of evaluations.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> [block_evaluations(3, p) for p in range(1, 6)]
      [3, 6, 10, 15, 21]
    """
    layers = check_int("layers", layers, least=0)
    visible = check_int("visible", visible, least=1)
    return math.comb(visible + layers - 1, layers - 1) if layers else 0


def total_visits(layers: int, length: int) -> int:
    """`Σ_p A_N(p) = C(L+N+1, N+1) − 1 − L`: key visits for decoding L tokens.

    Args:
      layers: N.
      length: L.

    Returns:
      The number of visits; about L^{N+1} / (N+1)!.

    Raises:
      ValueError: an argument is negative.

    Example:
      >>> [total_visits(n, 8) for n in (1, 2, 3, 4)]
      [36, 156, 486, 1278]
    """
    layers = check_int("layers", layers, least=0)
    length = check_int("length", length, least=0)
    return math.comb(length + layers + 1, layers + 1) - 1 - length


def windowed_visits(layers: int, visible: int, window: int) -> int:
    """A_n(p) where every query reads its last w keys only: `Σ_{p−w<j≤p} (1 + A_{n−1}(j))`.

    Args:
      layers: n.
      visible: p.
      window: w.

    Returns:
      The number of visits, at most w + w² + … + w^n for any p.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> windowed_visits(2, 7, 3), windowed_visits(2, 700, 3), windowed_visits(2, 7, 9)
      (12, 12, 35)
    """
    layers = check_int("layers", layers, least=0)
    visible = check_int("visible", visible, least=0)
    window = check_int("window", window, least=1)
    # Only the last n (w − 1) + 1 positions are ever read.
    start = max(0, visible - layers * window)
    below = [0] * (visible - start)
    for _ in range(layers):
        sums = list(itertools.accumulate((1 + cost for cost in below), initial=0))
        below = [sums[j + 1] - sums[max(0, j + 1 - window)] for j in range(len(below))]
    # Sums near the cut miss what lies before it; the newest position is not among them.
    return below[-1] if below else 0


def check_group(layers: int, group: int) -> int:
    """The group size, or an error unless it divides the number of layers.

    Example:
      >>> check_group(4, 2)
      2
    """
    group = check_int("group", group, least=1)
    if group > layers or layers % group:
        raise ValueError(f"group must divide the {layers} layers; got {group}.")
    return group


def mode_visits(
    mode: str, layers: int, visible: int, *, group: int | None = None, window: int | None = None
) -> int:
    """Key visits for one more token with p tokens visible, itself included.

    Args:
      mode: `kv_cache`, `input_cache`: N p; `layerwise`: N p (p+1) / 2, everything anew;
        `grouped`: (N/c) A_c(p); `recompute`: A_N(p).
      layers: N.
      visible: p.
      group: c, of `grouped` only.
      window: every query reads its last so many keys.

    Returns:
      The number of visits.

    Raises:
      ValueError: unknown mode, or c does not divide N.

    Example:
      >>> [mode_visits(m, 4, 64, group=2 if m == "grouped" else None) for m in MODES]
      [256, 256, 8320, 4288, 814384]
    """
    check_choice("mode", mode, MODES)
    layers = check_int("layers", layers, least=1)
    visible = check_int("visible", visible, least=0)
    window = visible if window is None else check_int("window", window, least=1)
    window = max(window, 1)
    if mode == "grouped":
        if group is None:
            raise ValueError("group must be given for mode 'grouped'; got None.")
        group = check_group(layers, group)
        return layers // group * windowed_visits(group, visible, window)
    if group is not None:
        raise ValueError(f"group must come with mode 'grouped'; got {group} with {mode!r}.")
    if mode == "recompute":
        return windowed_visits(layers, visible, window)
    if mode == "layerwise":
        return layers * sum(min(j, window) for j in range(1, visible + 1))
    return layers * min(visible, window)


def kept_numbers(
    mode: str,
    layers: int,
    visible: int,
    *,
    dim: int,
    groups: int,
    key_dim: int,
    value_dim: int | None = None,
    heads: int | None = None,
    group: int | None = None,
) -> int:
    """Numbers of hidden state between or within tokens, beside parameters and the p token ids.

    `kv_cache` N p G (dk + dv); `input_cache` N p d; `layerwise` p d; `grouped` (N/c) p d;
    `recompute` the frames, whatever p.

    Args:
      mode: as of `mode_visits`.
      layers: N.
      visible: p.
      dim: d, size of a layer's input.
      groups: key heads G.
      key_dim: size of a key.
      value_dim: size of a value. Default: `key_dim`.
      heads: query heads H, of the frames. Default: `groups`.
      group: c, of `grouped` only.

    Returns:
      The number of numbers.

    Raises:
      ValueError: unknown mode, or c does not divide N.

    Example:
      >>> sizes = dict(dim=8, groups=1, key_dim=8)
      >>> [kept_numbers(mode, 4, 100, **sizes) for mode in ("kv_cache", "input_cache", "recompute")]
      [6400, 3200, 104]
    """
    check_choice("mode", mode, MODES)
    value_dim = key_dim if value_dim is None else value_dim
    if mode == "recompute":
        return layers * frame_numbers(dim, groups if heads is None else heads, key_dim, value_dim)
    if mode == "grouped":
        if group is None:
            raise ValueError("group must be given for mode 'grouped'; got None.")
        return layers // check_group(layers, group) * visible * dim
    if mode == "kv_cache":
        return layers * visible * groups * (key_dim + value_dim)
    return visible * dim * (layers if mode == "input_cache" else 1)


def frame_numbers(dim: int, heads: int, key_dim: int, value_dim: int) -> int:
    """What `recompute` holds for one layer: q, o, the residual x, m and l.

    `H dk + H dv + d + 2 H`, beside two integer counters.

    Example:
      >>> frame_numbers(8192, 64, 128, 128)
      24704
    """
    return heads * key_dim + heads * value_dim + dim + 2 * heads


def post_state_size(dim: int, layers: int) -> int:
    """The post's estimate of the constant state: two vectors of the model's width for each layer.

    Args:
      dim: hidden size d.
      layers: N.

    Returns:
      2 d N.

    Example:
      >>> post_state_size(8192, 80)  # Llama-2-70B: "about 1M"
      1310720
    """
    return 2 * check_int("dim", dim, least=1) * check_int("layers", layers, least=1)
