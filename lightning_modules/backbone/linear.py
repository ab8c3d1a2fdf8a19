"""Linear layers that are quick on CPUs as well."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LARGE = 2**18  # weights of a layer that do not stay in the cache of a core
_LONG = 2**20  # multiplications of a product, above which it pays to ask oneDNN
_FULL_BLOCKS = (16, 32)  # rows
_LARGEST = 2**22  # weights, such as those of a head, above which 8 rows are enough


class Linear(nn.Linear):
    """A linear layer that loses no time on CPUs in single precision, where torch asks MKL for its products.

    Of many rows, oneDNN makes them in less than half the time on processors that are not Intel's, and in the same time
    on others. Of few rows, a product is bound by the reading of weights: where these are large, weights times inputs
    take a half to a third of the time of inputs times weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        fits = x.ndim > 1 and x.shape[-1] == self.in_features and x.numel() > 0
        if not on_cpu or not fits or torch.compiler.is_compiling():
            return super().forward(x)
        rows = x.numel() // self.in_features
        if self._is_small(rows):
            return self._of_few(x)
        if rows * self.weight.numel() >= _LONG and torch.backends.mkldnn.is_available():
            product = _Product.apply if torch.is_grad_enabled() else _product
            return product(x, self.weight, self.bias)
        return super().forward(x)

    def _is_small(self, rows: int) -> bool:
        """Inputs times weights are slow for so many rows, as measured; narrow ones even for one row."""
        few = 1 <= rows <= 4 if self.in_features <= 1024 else 2 <= rows <= 3
        return few and self.weight.numel() >= _LARGE and not torch.is_grad_enabled()

    def _of_few(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        product = self.weight @ (rows if len(rows) > 1 else rows.repeat(2, 1)).T  # two rows are quicker than one
        product = product[:, : len(rows)].T.contiguous()
        return (product if self.bias is None else product + self.bias).view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """Inputs [..., n] times weights [m, n], and their gradients, by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        rows = gradient.flatten(0, -2)
        return (
            None if weight is None else _product(gradient, weight.T),
            None if x is None else _smaller_first(rows.T, x.flatten(0, -2).T),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _smaller_first(left: Tensor, right: Tensor) -> Tensor:
    """The product of [m, r] and [n, r], [m, n]; oneDNN is quicker with the larger one in the place of weights."""
    return _product(left, right) if len(left) <= len(right) else _product(right, left).T


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Inputs [..., n] times weights [m, n] plus bias [m], [..., m], by oneDNN.

    It lays out anew what is in the place of weights, which takes long beside a product of few rows. So these are put
    there instead, where they fill its blocks.
    """
    by_onednn = torch.ops.mkldnn._linear_pointwise
    rows = x.numel() // x.shape[-1]
    if rows not in _FULL_BLOCKS and not (rows == 8 and weight.numel() >= _LARGEST):
        return by_onednn(x, weight, bias, "none", [], "")
    product = by_onednn(weight, x.reshape(-1, x.shape[-1]), None, "none", [], "").T.contiguous()
    return (product if bias is None else product + bias).view(*x.shape[:-1], -1)
