"""Labels for optax: which parameters learn slowly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxkit.ssm import S4, SequenceModel, SSMParam, rtf, s4, s4d, ssm_labels

SLOW = {"log_neg_re", "im", "p", "b", "log_step"}


def test_labels_of_parameter_dicts():
    for family, options in ((s4, {"l_max": 8}), (s4d, {})):
        params = family.init_params(jax.random.key(0), 2, 4, **options)
        labels = ssm_labels({"layer": [params]})["layer"][0]
        assert {name for name, label in labels.items() if label == "ssm"} == SLOW & set(params)
        assert {labels["c"], labels["d"]} == {"regular"}
    other = {"b": jnp.ones(2), "p": jnp.ones(2)}
    assert set(ssm_labels(other).values()) == {"regular"}
    rational = rtf.init_params(jax.random.key(0), 2, 4, l_max=8)
    assert set(ssm_labels(rational).values()) == {"regular"}
    shapes = jax.eval_shape(lambda: s4.init_params(jax.random.key(0), 2, 4, l_max=8))
    assert ssm_labels(shapes)["im"] == "ssm"


def test_labels_of_a_model_follow_the_variable_type():
    model = SequenceModel(1, 2, heads=4, state_size=4, l_max=8, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    labels = ssm_labels(state)
    slow = nnx.to_pure_dict(nnx.state(model, SSMParam))
    assert jax.tree.leaves(labels).count("ssm") == len(jax.tree.leaves(slow)) == 10
    assert jax.tree.structure(labels) == jax.tree.structure(state)
    pure = ssm_labels(nnx.to_pure_dict(state))
    assert jax.tree.leaves(pure).count("ssm") == 10


def test_frozen_dynamics_are_no_parameters():
    layer = S4(4, 4, l_max=8, frozen=True, rngs=nnx.Rngs(0))
    assert set(nnx.to_pure_dict(nnx.state(layer, nnx.Param))) == {"c", "d", "log_step"}
    assert set(nnx.to_pure_dict(nnx.state(layer, SSMParam))) == {"log_step"}


def test_two_rates_in_one_optimizer():
    params = s4.init_params(jax.random.key(0), 2, 4, l_max=8, dtype=jnp.float64)
    optimizer = optax.multi_transform(
        {"ssm": optax.sgd(1e-3), "regular": optax.sgd(1e-1)}, ssm_labels
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for name, update in updates.items():
        np.testing.assert_allclose(update, -1e-3 if name in SLOW else -1e-1)
