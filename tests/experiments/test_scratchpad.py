"""The scratchpad experiment: its texts, its test of an answer, and claims that can fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxkit_experiments.experiment import Results
from jaxkit_experiments.vq import scratchpad
from jaxkit_experiments.vq.scratchpad import Doublings, Scratchpad, ScratchpadConfig

from tests.experiments.smoke import smoke_run

SMALL = ScratchpadConfig(starts=40, doublings=5, batch_size=6)


def records(config, tokens):
    """The text as (value, remaining) of each record, read as a person would."""
    text = "".join("0123456789,"[t] for t in tokens)
    assert text.endswith(",")
    parts = text[:-1].split(",")
    assert all(len(part) == config.width + 2 for part in parts)
    return [(int(part[:-2]), int(part[-2:])) for part in parts]


@pytest.mark.parametrize("config", [SMALL, ScratchpadConfig()], ids=["small", "gpu"])
@pytest.mark.parametrize("arm", scratchpad.ARMS)
def test_texts_are_the_doublings(config, arm):
    source = Doublings(config, arm, 0)
    starts = np.array([1, 7, config.starts, 10, 1])
    times = np.array([config.doublings, 3, config.doublings, 1, 1])
    tokens, asked = source.write(starts, times)
    for row, real, a, x in zip(tokens, asked, starts.tolist(), times.tolist(), strict=True):
        own = [(a, x), (a * 2**x, 0)]
        if arm == "chain":
            own = [(a * 2**k, x - k) for k in range(x + 1)]
        got = records(config, row)
        assert got[: len(own)] == own
        # The question is given, the rest of the line is asked for, what fills it up is not.
        answered = real.reshape(-1, config.record)
        assert (answered == answered[:, :1]).all()
        assert answered[:, 0].tolist() == [0 < j < len(own) for j in range(len(got))]


def test_doubling_never_leads_from_training_to_a_held_out_start():
    kept = {a for a in range(1, 2000) if scratchpad.held_out(a)}
    assert {2**n for n in range(11)} <= kept
    assert 0.2 < len(kept) / 2000 < 0.3
    assert all((2 * a in kept) == (a in kept) for a in range(1, 1000))
    source = Doublings(SMALL, "chain", 3)
    held = {a * 2**k for a in range(1, 41) if a in kept for k in range(6)}
    for step in range(20):
        batch = source[step]
        for row in batch["tokens"]:
            assert not {value for value, _ in records(SMALL, row)} & held
    parts = scratchpad.starts_to_test(SMALL)
    assert parts["power"].tolist() == [1]
    assert set(parts["held_out"].tolist()) <= kept - {1}
    assert not set(parts["trained"].tolist()) & kept


def test_batches_are_found_again_and_arms_see_as_many_tokens():
    sources = {arm: Doublings(SMALL, arm, 1) for arm in scratchpad.ARMS}
    sizes = {arm: source[0]["tokens"].size for arm, source in sources.items()}
    assert sizes["direct"] == sizes["chain"]
    batch = sources["chain"][4]
    again = Doublings(SMALL, "chain", 1)[4]
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    assert not np.array_equal(batch["tokens"], sources["chain"][5]["tokens"])
    assert not np.array_equal(batch["tokens"], Doublings(SMALL, "chain", 2)[4]["tokens"])
    times = {records(SMALL, row)[0][1] for n in range(30) for row in sources["chain"][n]["tokens"]}
    assert times == set(range(1, 6))


def test_questions_are_all_numbers_of_doublings():
    source = Doublings(SMALL, "direct", 0)
    questions = source.questions(np.array([3, 5]))
    assert questions["tokens"].shape == questions["asked"].shape == (5, 2, 2 * SMALL.record)
    for x in range(1, 6):
        for place, a in enumerate((3, 5)):
            got = records(SMALL, questions["tokens"][x - 1, place])
            assert got == [(a, x), (a << x, 0)]


def test_an_answer_is_right_if_every_asked_token_is():
    tokens, asked = Doublings(SMALL, "chain", 0).write(np.array([7] * 4), np.array([2] * 4))
    first, last = np.flatnonzero(asked[0])[[0, -1]]
    # One prediction each is wrong: none, in the question, in the answer, behind it.
    wrong = [None, first - 1, last, last + 1]
    said = np.roll(tokens, -1, axis=1)[:, :-1]
    for row, place in enumerate(wrong):
        if place is not None:
            said[row, place - 1] = (said[row, place - 1] + 1) % 11

    def model(given):
        assert given.shape == said.shape
        return 5.0 * jax.nn.one_hot(said, 11, dtype=jnp.float64)

    batch = {"tokens": jnp.asarray(tokens), "asked": jnp.asarray(asked)}
    nats, right = jax.jit(lambda batch: scratchpad.answers(model, batch))(batch)
    assert right.tolist() == [True, True, False, True]
    # Everything asked costs the same but the one that is wrong, which costs 5 nats more.
    alike = np.log1p(10 * np.exp(-5.0))
    np.testing.assert_allclose(nats, alike + 5 / asked.sum(), rtol=1e-12)


def test_accuracy_is_told_by_x_and_by_kind_of_start(monkeypatch):
    right = np.array([[1, 1, 0, 1], [0, 1, 0, 0]], bool)  # [x, start]
    monkeypatch.setattr(scratchpad, "answers", lambda _, row: (0.0, row))
    counts = {"power": 1, "held_out": 2, "trained": 1}
    got = scratchpad.accuracy_by_x(counts, None, jnp.asarray(right))
    assert {name: values.tolist() for name, values in got.items()} == {
        "power": [1, 0],
        "held_out": [0.5, 0.5],
        "trained": [1, 0],
    }
    assert scratchpad.evaluate(counts, None, jnp.asarray(right))["trained"] == 0.5


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return smoke_run(Scratchpad(), tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_smoke_preset_end_to_end(smoke):
    ctx, config, arms = smoke
    results = Results(config, arms)
    for arm in scratchpad.ARMS:
        assert set(Scratchpad.columns) <= set(results.metrics(arm))
        assert all(len(values) == 1 for values in arms[arm].values())
        kept = ctx.load_arrays(f"accuracy-{arm}")
        assert kept["held_out"].shape == (1, config.doublings)
        np.testing.assert_allclose(results.mean(arm, "held_out"), kept["held_out"].mean())
    verdicts = [claim.judge(results) for claim in Scratchpad.claims]
    assert {verdict.status for verdict in verdicts} == {"not testable"}
    paths = Scratchpad().plot(results, ctx)
    assert paths[-1].name == "accuracy.png"
    assert paths[-1].stat().st_size > 5000


CPU = Scratchpad.presets["cpu"]


def judge(direct, chain, config=CPU):
    arms = {
        arm: {"reach": [reach], "last": [last]}
        for arm, (reach, last) in (("direct", direct), ("chain", chain))
    }
    return [claim.judge(Results(config, arms)).status for claim in Scratchpad.claims]


def test_claims():
    held, fails = "held", "not held"
    assert judge((2, 0.03), (8, 0.97)) == [held, held, held]
    assert judge((8, 0.9), (8, 0.97)) == [fails, held, fails]
    assert judge((2, 0.3), (8, 0.97)) == [fails, held, held]
    assert judge((2, 0.0), (7, 0.97)) == [held, fails, held]
    assert judge((2, 0.0), (8, 0.8)) == [held, fails, held]
    assert judge((2, 0.0), (1, 0.0)) == [held, fails, fails]
    short = dataclasses.replace(CPU, steps=100)
    assert set(judge((2, 0.03), (8, 0.97), short)) == {"not testable"}
    alone = Results(CPU, {"direct": {"reach": [2], "last": [0.0]}})
    statuses = [claim.judge(alone).status for claim in Scratchpad.claims]
    assert statuses == ["held", "not testable", "not testable"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("chains",)}, "Did you mean 'chain'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"starts": 8}, "starts must be at least 16"),
        ({"doublings": 100}, "doublings must be below 100; got 100"),
        ({"key_dim": 48}, "key_dim must divide model_dim = 128; got 48"),
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0"),
        ({"seeds": ()}, "seeds must hold at least one seed"),
    ],
)
def test_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        ScratchpadConfig(**change)
