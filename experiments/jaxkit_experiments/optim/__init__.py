"""Experiments on optimizers and the theory of training."""
