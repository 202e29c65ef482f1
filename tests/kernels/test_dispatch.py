"""Choice of implementation and of block sizes."""

import jax
import jax.numpy as jnp
import pytest
from jaxkit_kernels import _blocks, _dispatch


def refuse(*_):
    raise NotImplementedError("odd shape")


def wrong(*_):
    raise ValueError("a bug")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"one of 'auto', 'reference', .*; got 'triton'"):
        _dispatch.dispatch("op", "triton", {}, 1)


def test_explicit_name_raises_with_the_reason():
    table = {"pallas_tpu": refuse, "xla": lambda x: x}
    with pytest.raises(NotImplementedError, match="odd shape"):
        _dispatch.dispatch("op", "pallas_tpu", table, jnp.ones(3))
    with pytest.raises(NotImplementedError, match=r"op has no implementation 'pallas_gpu'; it has"):
        _dispatch.dispatch("op", "pallas_gpu", table, jnp.ones(3))


def test_auto_falls_back_on_not_implemented_alone():
    x = jnp.ones(3)
    table = {"xla": refuse, "reference": lambda x: 2 * x}
    assert (_dispatch.dispatch("op", "auto", table, x) == 2).all()
    with pytest.raises(ValueError, match="a bug"):
        _dispatch.dispatch("op", "auto", {"xla": wrong, "reference": lambda x: x}, x)
    with pytest.raises(NotImplementedError, match=r"op: no implementation takes .*odd shape"):
        _dispatch.dispatch("op", "auto", {"xla": refuse}, x)


@pytest.mark.parametrize(
    ("platform", "primitive"), [("tpu", "sine"), ("cuda", "cosine"), ("cpu", "tanh")]
)
def test_auto_follows_the_platform_of_the_lowering(platform, primitive):
    table = {
        "pallas_tpu": jnp.sin,
        "pallas_gpu": jnp.cos,
        "xla": jnp.tanh,
        "reference": lambda x: x,
    }
    function = jax.jit(lambda x: _dispatch.dispatch("op", "auto", table, x))
    text = function.trace(jnp.ones(3)).lower(lowering_platforms=(platform,)).as_text()
    found = {name for name in ("sine", "cosine", "tanh") if f"stablehlo.{name}" in text}
    assert found == {primitive}


def test_missing_module_is_refused():
    with pytest.raises(NotImplementedError, match="cannot be imported here"):
        _dispatch.lazy("jaxkit_kernels.no_such_backend", "forward")(1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: _blocks.CauchyXlaBlocks(chunk=12), ValueError, r"multiple of 8; got 12"),
        (lambda: _blocks.CauchyXlaBlocks(chunk=0), ValueError, r"chunk must lie in \[1, "),
        (lambda: _blocks.CauchyXlaBlocks(chunk=8.0), TypeError, r"chunk must be an int; got 8.0"),
        (lambda: _blocks.CauchyTpuBlocks(rows=True), TypeError, r"rows must be an int; got True"),
        (
            lambda: _blocks.CauchyGpuBlocks(nodes=384, nodes_backward=128),
            ValueError,
            r"nodes must be a power of two; got 384",
        ),
        (lambda: _blocks.VandermondeGpuBlocks(rows=64), ValueError, r"\[1, 32\]; got 64"),
    ],
)
def test_block_sizes_check_themselves(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_choice_of_block_sizes():
    kind, entry, guess = (
        _blocks.CauchyXlaBlocks,
        *(_blocks.CauchyXlaBlocks(chunk=chunk) for chunk in (64, 8)),
    )
    table = {(_blocks.device_kind("cpu"), (4, 128)): entry}
    choose = lambda given, shape: _blocks.choose(given, kind, table, "cpu", shape, lambda: guess)
    assert choose(None, (3, 100)) == entry
    assert choose(None, (3, 129)) == guess
    given = _blocks.CauchyXlaBlocks(chunk=16)
    assert choose(given, (3, 100)) is given
    # Sizes meant for another backend are passed over.
    assert choose(_blocks.CauchyTpuBlocks(rows=8), (3, 100)) == entry
