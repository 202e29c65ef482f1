"""State-space models: structured layers, their kernels and recurrences, and models over them."""

from jaxkit.ssm import discretize, hippo, init, rtf, s4, s4d, s5, scan
from jaxkit.ssm.conv import fft_conv, fft_conv_bidirectional
from jaxkit.ssm.layers import S4, S5, FrozenSSMParam, Recurrent, SSMParam
from jaxkit.ssm.model import ModelState, SequenceBlock, SequenceModel
from jaxkit.ssm.rates import ssm_labels

__all__ = [
    "FrozenSSMParam",
    "ModelState",
    "Recurrent",
    "S4",
    "S5",
    "SSMParam",
    "SequenceBlock",
    "SequenceModel",
    "s4d",
    "discretize",
    "s4",
    "fft_conv",
    "fft_conv_bidirectional",
    "hippo",
    "init",
    "rtf",
    "s5",
    "scan",
    "ssm_labels",
]
