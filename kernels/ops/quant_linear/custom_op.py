"""quant_linear as a custom op."""

from ..linear.custom_op import define

call, implement = define("quant_linear", "Tensor packed, int out, int width, int bits", lambda _, out, *__: out)
