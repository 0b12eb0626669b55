"""Root-mean-square norm in the precision of its input."""

from torch import Tensor, nn
from torch.nn.functional import rms_norm


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` (Zhang, Sennrich, arXiv 1910.07467) whose weight follows the input's dtype.

    Under bf16 autocast torch's own keeps a float32 weight, which rules out its fused kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return rms_norm(x, self.normalized_shape, weight, self.eps)
