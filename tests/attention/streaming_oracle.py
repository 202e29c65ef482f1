"""Dense softmax attention in NumPy float64: the independent oracle of the streaming forms."""

import numpy as np


def visible(T, S, *, causal=False, window=None, offset=None, kv_length=None, segments=None):
    """Visible pairs [T, S]."""
    i, j = np.arange(T)[:, None], np.arange(S)[None]
    seen = np.ones((T, S), bool)
    if causal:
        offset = S - T if offset is None else offset
        seen &= j <= i + offset
        if window is not None:
            seen &= j > i + offset - window
    if kv_length is not None:
        seen &= j < kv_length
    if segments is not None:
        seen &= segments[0][:, None] == segments[1][None]
    return seen


def dense(q, k, v, *, mask=None, bias=None, scale=None, soft_cap=None, sinks=None):
    """(out, lse) of q [..., T, H, d], k [..., S, G, d], v [..., S, G, e]; 0 with no key seen."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    each = q.shape[-2] // k.shape[-2]
    k, v = np.repeat(k, each, -2), np.repeat(v, each, -2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = scale * np.einsum("...qhd,...khd->...hqk", q, k)
    if soft_cap is not None:
        s = soft_cap * np.tanh(s / soft_cap)
    if bias is not None:
        s = s + np.asarray(bias, np.float64)
    if mask is not None:
        s = np.where(mask, s, -np.inf)
    top = s.max(-1, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)
    if sinks is not None:
        extra = np.asarray(sinks, np.float64)[:, None, None]
        top = np.maximum(top, extra)
    e = np.exp(s - top)
    l = e.sum(-1, keepdims=True)
    if sinks is not None:
        l = l + np.exp(extra - top)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(l))[..., 0]
    out = np.einsum("...hqk,...khd->...qhd", e / np.where(l == 0, 1, l), v)
    return out, np.moveaxis(lse, -2, -1)


def card_problem():
    """The card's check 1: T = 6, dk = 3, dv = 2, scale 1."""
    t = np.arange(6.0)[:, None]
    c, e = np.arange(3.0)[None], np.arange(2.0)[None]
    q = 2 * np.sin(0.7 * t + 1.3 * c)
    k = 2 * np.sin(0.9 * t + 2.1 * c + 0.5)
    v = np.sin(0.4 * t + 0.8 * e + 1)
    return q[:, None], k[:, None], v[:, None]


LSE = (
    -0.074984978312,
    3.859104994351,
    6.238505743880,
    6.579820063001,
    4.813762864888,  # the card has 4.813764862888; test_card_digits_by_mpmath
    3.497999536540,
)
OUT_LAST = (0.860071825169, 0.296441626840)
STATES_M = (-1.721603165855, 0.821866912396, *(2.743364496529,) * 4)
STATES_L = (1.0, 1.078593201496, 1.157892637990, 2.014628197237, 2.118110191394, 2.126835171954)
O_LAST = (1.829231008177, 0.630482478395)
