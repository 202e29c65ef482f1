"""What every Mosaic GPU kernel needs to know of the device."""

import jax

__all__ = ["check_device"]


def check_device() -> None:
    """Refuse NVIDIA devices older than Hopper, which Mosaic GPU does not compile for.

    With no such device on the host, as in interpret mode and ahead-of-time compilation, nothing
    is refused.

    Raises:
        NotImplementedError: with the compute capability found.

    Example:
        >>> check_device()
    """
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return
    capability = str(getattr(device, "compute_capability", "9.0"))
    if int(capability.split(".")[0]) < 9:
        raise NotImplementedError(
            f"the kernel needs compute capability 9.0 (Hopper) or newer; got {capability}."
        )
