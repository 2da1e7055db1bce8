"""The operations a GPT spends its time in, one a file, each behind one public function for every device."""

from kernels.activation import bias_activation
from kernels.attention import attention, attention_packed
from kernels.attention_decode import attention_decode
from kernels.cross_entropy import linear_cross_entropy
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.rotary import rotary
from kernels.softmax import softmax

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_decode",
    "attention_packed",
    "bias_activation",
    "layer_norm",
    "linear_cross_entropy",
    "rotary",
    "softmax",
]
