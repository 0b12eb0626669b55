"""One GRU layer over whole sequences, its gradient written out.

Shapes: S steps, N sequences, H hidden; a number before H counts blocks of H beside each other.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gru_states(
    input_SNH: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    """Return the states (S, N, H) of a GRU layer from zero, with weights laid out as in `nn.GRU`.

    r, z = sigmoid(W x + U h + b); n = tanh(W_n x + b_n + r (U_n h + c_n)); h' = (1 - z) n + z h
    (Cho et al., arXiv 1406.1078, with the reset gate after the product as in cuDNN). The input's
    products are one matrix product for all steps, so are the gradients of the weights; `nn.GRU`
    adds up the latter step by step on a CPU, in small operations that occupy one core. All are in
    the input's dtype, under autocast too. Raises ValueError where there is no step.
    """
    if not len(input_SNH):
        raise ValueError("steps: a recurrence over none; at least 1 is needed")
    with torch.autocast(input_SNH.device.type, enabled=False):
        states: Tensor = _GRU.apply(input_SNH, weight_ih, weight_hh, bias_ih, bias_hh)
    return states


def gru_step(
    input_H: Tensor,
    state_H: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> Tensor:
    """Return the next state (H,) of a layer."""
    hidden = len(state_H)
    of_input, of_state = (
        torch.addmv(bias, weight, vector_H).split([2 * hidden, hidden])
        for bias, weight, vector_H in (
            (bias_ih, weight_ih, input_H),
            (bias_hh, weight_hh, state_H),
        )
    )
    reset_H, keep_H = (of_input[0] + of_state[0]).sigmoid().chunk(2)
    new_H = torch.addcmul(of_input[1], reset_H, of_state[1]).tanh()
    return torch.lerp(new_H, state_H, keep_H)


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input_SNH: Tensor, weight_ih: Tensor, weight_hh: Tensor, *biases: Tensor
    ) -> Tensor:
        bias_ih, bias_hh = biases
        hidden = input_SNH.shape[-1]
        inner = slice(0, 2 * hidden)  # the gates whose biases simply add up
        bias = torch.cat([bias_ih[inner] + bias_hh[inner], bias_ih[2 * hidden :]])
        gates_SN3H = torch.addmm(bias, input_SNH.flatten(0, 1), weight_ih.t())
        gates_SN3H = gates_SN3H.unflatten(0, input_SNH.shape[:2])
        back_SNH = torch.empty_like(input_SNH)
        states_SNH = input_SNH.new_zeros(len(input_SNH) + 1, *input_SNH.shape[1:])
        product_N3H = gates_SN3H.new_empty(gates_SN3H.shape[1:])
        product_N2H, product_NH = product_N3H.split([2 * hidden, hidden], dim=-1)
        both_SN2H, new_SNH = gates_SN3H.split([2 * hidden, hidden], dim=-1)
        reset_SNH, keep_SNH = both_SN2H.chunk(2, dim=-1)
        steps = (both_SN2H, reset_SNH, keep_SNH, new_SNH, back_SNH, states_SNH, states_SNH[1:])
        for both, reset, keep, new, back, state, later in zip(*steps, strict=False):
            torch.mm(state, weight_hh.t(), out=product_N3H)
            both.add_(product_N2H).sigmoid_()
            torch.add(product_NH, bias_hh[2 * hidden :], out=back)
            new.addcmul_(reset, back).tanh_()
            torch.lerp(new, state, keep, out=later)
        ctx.save_for_backward(input_SNH, weight_ih, weight_hh, gates_SN3H, back_SNH, states_SNH)
        return states_SNH[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SNH: Tensor) -> tuple[Tensor, ...]:
        input_SNH, weight_ih, weight_hh, gates_SN3H, back_SNH, states_SNH = ctx.saved_tensors
        hidden = input_SNH.shape[-1]
        with torch.autocast(grad_SNH.device.type, enabled=False):
            grad_SN4H = _slopes(gates_SN3H, back_SNH, states_SNH[:-1])
            _chain(grad_SN4H, grad_SNH, gates_SN3H.chunk(3, dim=-1)[1], weight_hh)
            rows_4H = grad_SN4H.flatten(2).flatten(0, 1)
            # n, r, z of the input's product; r, z, n of the state's.
            of_input, of_state = rows_4H[:, : 3 * hidden], rows_4H[:, hidden:]
            grad_input = (of_input @ weight_ih.roll(hidden, 0)).view_as(input_SNH)
            grad_ih = (of_input.t() @ input_SNH.flatten(0, 1)).roll(-hidden, 0)
            grad_hh = of_state.t() @ states_SNH[:-1].flatten(0, 1)
            bias_4H = rows_4H.sum(dim=0)
        return grad_input, grad_ih, grad_hh, bias_4H[: 3 * hidden].roll(-hidden), bias_4H[hidden:]


def _slopes(gates_SN3H: Tensor, back_SNH: Tensor, state_SNH: Tensor) -> Tensor:
    """Return what a change of n, r, z before their functions, of U_n h, changes: (S, N, 4, H)."""
    reset_SNH, keep_SNH, new_SNH = gates_SN3H.chunk(3, dim=-1)
    slope_SN4H = back_SNH.new_empty(*back_SNH.shape[:2], 4, back_SNH.shape[2])
    of_new, of_reset, of_keep, of_back = slope_SN4H.unbind(2)
    torch.addcmul(back_SNH.new_ones(()), new_SNH, new_SNH, value=-1, out=of_new)
    of_new.addcmul_(of_new, keep_SNH, value=-1)
    torch.mul(of_new, reset_SNH, out=of_back)
    torch.mul(of_back, back_SNH, out=of_reset)
    of_reset.addcmul_(of_reset, reset_SNH, value=-1)
    torch.sub(state_SNH, new_SNH, out=of_keep)
    of_keep.mul_(keep_SNH)
    of_keep.addcmul_(of_keep, keep_SNH, value=-1)
    return slope_SN4H


def _chain(slope_SN4H: Tensor, grad_SNH: Tensor, keep_SNH: Tensor, weight_hh: Tensor) -> None:
    """Turn the slopes into gradients in place, from the last step to the first."""
    total_NH = grad_SNH[-1]
    of_state_SN3H = slope_SN4H.flatten(2)[..., total_NH.shape[-1] :]
    for step in range(len(grad_SNH) - 1, -1, -1):
        slope_SN4H[step].mul_(total_NH[:, None])
        if step:
            through_NH = torch.mm(of_state_SN3H[step], weight_hh)
            total_NH = through_NH.addcmul_(total_NH, keep_SNH[step]).add_(grad_SNH[step - 1])
