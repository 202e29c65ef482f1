"""Benchmarks: against other ways to compute the same thing, and against the device's limit.

`measure` times functions side by side and reads the compiler's memory plan, `roofline` counts
work and bounds the time on named devices, `bench` is what the benchmarks share, and `ssm`, `vq`
and `optim` are `jaxkit bench ssm`, `jaxkit bench vq` and `jaxkit bench optim`.
"""
