"""A run of an experiment's smoke preset, arm by arm, as the runner makes it."""

from jaxkit_experiments.experiment import Context

from tests.settings import users_settings


def smoke_run(experiment, folder, config=None):
    """The context, the config, and what every arm measured."""
    config = experiment.presets["smoke"] if config is None else config
    ctx = Context(folder)
    with users_settings():
        arms = {arm: experiment.run_arm(config, arm, ctx.for_arm(arm)) for arm in config.arms}
    return ctx, config, arms
