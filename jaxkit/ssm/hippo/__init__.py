"""HiPPO: online projection of a signal's past onto orthogonal bases.

`project` runs a memory over a signal, `reconstruct` reads the signal back, `transition` gives the
matrices. `legs_*` are the O(N) steps, scans and closed forms of the measure of the whole past;
`lti_*` scan the measures with a window. `HippoCell` and `LMUCell` put the memories into recurrent
networks.
"""

from jaxkit.ssm.hippo.cells import HippoCell, HippoMemory, HippoState, LMUCell
from jaxkit.ssm.hippo.legs import (
    INPUT_WEIGHTS,
    LEGS_METHODS,
    legs_apply,
    legs_coefficients,
    legs_propagate,
    legs_scan,
    legs_solve,
    legs_step,
    legs_transition,
)
from jaxkit.ssm.hippo.lti import lti_scan, lti_scan_varying
from jaxkit.ssm.hippo.measures import MEASURES, SCALED_MEASURES, basis_scale, transition
from jaxkit.ssm.hippo.project import project
from jaxkit.ssm.hippo.reconstruct import (
    fourier_series,
    laguerre_series,
    legendre_series,
    reconstruct,
)

__all__ = [
    "MEASURES",
    "SCALED_MEASURES",
    "LEGS_METHODS",
    "INPUT_WEIGHTS",
    "transition",
    "basis_scale",
    "project",
    "reconstruct",
    "legs_apply",
    "legs_solve",
    "legs_step",
    "legs_scan",
    "legs_coefficients",
    "legs_transition",
    "legs_propagate",
    "lti_scan",
    "lti_scan_varying",
    "legendre_series",
    "fourier_series",
    "laguerre_series",
    "HippoCell",
    "HippoMemory",
    "HippoState",
    "LMUCell",
]
