"""The sequence-task experiments: data, model, loss, optimizer and claims of every arm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxkit_experiments.experiment import Results
from jaxkit_experiments.ssm import sequence_tasks as st
from jaxkit_experiments.ssm import tasks

TINY = st.DigitsConfig(seeds=(0,), steps=4, batch_size=8, heads=4, state_size=4, layers=1)
EXPERIMENTS = (
    st.Digits,
    st.PermutedDigits,
    st.RateChange,
    st.Copying,
    st.SelectiveCopying,
    st.Delay,
    st.Adding,
    st.ListOps,
)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda cls: cls.name)
def test_presets_and_claims_speak_of_arms_that_exist(experiment):
    assert {"smoke", "cpu", "gpu"} <= set(experiment.presets)
    for config in experiment.presets.values():
        assert isinstance(config, experiment.config_class)
        assert set(config.arms) <= set(st.ARMS)
    assert set(experiment.paper) <= set(st.ARMS)
    metric = "rmse" if "rmse" in experiment.columns else "accuracy"
    names = (metric, "recurrent_difference", "root_operator", "half_rate", "half_rate_same_step")
    everything = {arm: {name: [0.5] for name in names} for arm in st.ARMS}
    results = Results(None, everything)
    for claim in experiment.claims:
        assert claim.judge(results).status in ("held", "not held")
        assert claim.judge(Results(None, {})).status == "not testable"


@pytest.mark.parametrize(
    ("s4", "gru", "status"), [(0.9, 0.8, "held"), (0.82, 0.8, "not held"), (0.5, 0.8, "not held")]
)
def test_a_margin_is_asked_of_the_difference(s4, gru, status):
    results = Results(None, {"s4-legs": {"accuracy": [s4]}, "gru": {"accuracy": [gru]}})
    assert st.Digits.claims[0].judge(results).status == status


@pytest.mark.x32
@pytest.mark.parametrize("arm", ["s4-legs", "s4d-real", "s5", "rtf", "gru", "lstm"])
def test_every_arm_is_one_function_in_both_forms(arm):
    task = tasks.digits()
    model = st.build_model(TINY, arm, task, jax.random.key(0))
    inputs = jnp.asarray(task.test["inputs"][:3])
    counts = jnp.asarray(np.arange(64)[None] < np.array([64, 40, 1])[:, None])
    whole = model(inputs, mask=counts)
    stepped = st.step_by_step(model, inputs, counts)
    np.testing.assert_allclose(stepped, whole, atol=2e-5 * float(jnp.abs(whole).max()))
    # The read-out has seen only what counts.
    changed = inputs.at[1, 40:].set(9.0)
    np.testing.assert_allclose(model(changed, mask=counts)[1], whole[1], rtol=1e-4, atol=1e-5)


@pytest.mark.x32
def test_only_the_outputs_that_count_are_scored():
    class Fixed(nnx.Module):
        def __call__(self, inputs, mask=None, key=None):
            return jnp.eye(3)[inputs] * 5.0

    inputs = jnp.asarray([[0, 1, 2], [2, 2, 0]])
    targets = jnp.asarray([[0, 0, 2], [1, 2, 0]])
    batch = {"inputs": inputs, "targets": targets}
    _, metrics = st.score(Fixed(), batch, classes=True)
    assert float(metrics["accuracy"]) == pytest.approx(4 / 6)
    weight = jnp.asarray([[False, True, True], [False, False, False]])
    loss, metrics = st.score(Fixed(), batch | {"loss_mask": weight}, classes=True)
    assert float(metrics["accuracy"]) == pytest.approx(1 / 2)
    log_sum = np.log(np.exp(5.0) + 2)
    assert float(loss) == pytest.approx((log_sum + log_sum - 5) / 2, rel=1e-6)


@pytest.mark.x32
def test_dynamics_learn_at_their_own_rate_without_decay():
    config = dataclasses.replace(TINY, weight_decay=0.5, clip=1e9)
    model = st.build_model(config, "s4-legs", tasks.digits(), jax.random.key(0))
    params = nnx.state(model, nnx.Param)
    optimizer = st.build_optimizer(config, params)
    gradients = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction: float ** int
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    flat = {
        jax.tree_util.keystr(path): (np.asarray(update), np.asarray(param))
        for (path, update), param in zip(
            jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
        )
    }
    dynamics = ("log_neg_re", "im", "p", "b", "log_step")
    slow = {name for name in flat if any(f"'{key}'" in name for key in dynamics)}
    assert len(slow) == len(dynamics)
    for name, (update, param) in flat.items():
        if name in slow:
            # Adam's first step is the rate itself.
            np.testing.assert_allclose(update, -1e-3, rtol=1e-4, err_msg=name)
        else:
            np.testing.assert_allclose(
                update, -4e-3 * (1 + 0.5 * param), rtol=1e-4, atol=1e-7, err_msg=name
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("s4-lgs",)}, "arms must be one of .*s4-legs"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"dt_min": 0.0}, "dt_min must be greater than 0"),
        ({"dt_max": 1e-3}, "dt_max must be greater than 0.01"),
        ({"bidirectional": True, "arms": ("gru",)}, "bidirectional must be False"),
    ],
)
def test_wrong_config_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(st.DigitsConfig(), **changes)
