"""The scans, the GRU, the norms and the dropout against plain ones.

Shapes: B batch, T time, H features, D vector dim, S steps, N sequences.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from lvm.models.layers import Dropout, RMSNorm, RunningAverage, gated_scan, moving_average, unit
from lvm.models.recurrent import gru_states

DOUBLE = {"dtype": torch.float64}


def drawn(*shape: int, seed: int = 0, **options) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def plain_gated_scan(gate_and_value_BTX: Tensor) -> Tensor:
    """Unroll h_t = (1 - sigmoid(g_t)) h_{t-1} + sigmoid(g_t) v_t step by step."""
    gate_BTH, value_BTH = gate_and_value_BTX.chunk(2, dim=-1)
    state_BH, states = torch.zeros_like(value_BTH[:, 0]), []
    for gate_BH, value_BH in zip(gate_BTH.unbind(1), value_BTH.unbind(1), strict=True):
        update_BH = gate_BH.sigmoid()
        state_BH = (1 - update_BH) * state_BH + update_BH * value_BH
        states.append(state_BH)
    return torch.stack(states, dim=1)


def gradients(value: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return those of a sum whose weights are drawn."""
    return torch.autograd.grad((value * drawn(*value.shape, seed=9)).sum(), inputs)


@pytest.mark.parametrize("steps", [*range(1, 31), 64, 77, 97, 200])
def test_the_gated_scan_equals_the_loop_and_so_does_its_gradient(steps: int) -> None:
    input_BTX = drawn(2, steps, 6, **DOUBLE).requires_grad_()
    fast_BTH, plain_BTH = gated_scan(input_BTX), plain_gated_scan(input_BTX)
    torch.testing.assert_close(fast_BTH, plain_BTH)
    torch.testing.assert_close(gradients(fast_BTH, [input_BTX]), gradients(plain_BTH, [input_BTX]))


class Counter(TorchDispatchMode):
    """Counts the operations that torch runs, those of a backward pass too."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.count += 1
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("steps", [997, 1000, 1024, 2 * 499])
def test_the_operations_of_a_scan_grow_with_the_root_of_its_steps(steps: int) -> None:
    """Steps that run one after the other are operations of their own: all in a row were 13,000."""
    input_BTX = drawn(1, steps, 2).requires_grad_()
    with Counter() as of_scan:
        gated_scan(input_BTX).sum().backward()
    with Counter() as of_average:
        moving_average(input_BTX.detach(), 0.5)
    assert 10 * steps**0.5 < of_scan.count < 40 * steps**0.5
    assert 2 * steps**0.5 < of_average.count < 15 * steps**0.5


@pytest.mark.parametrize(
    "run",
    [
        lambda: gated_scan(torch.empty(2, 0, 6)),
        lambda: moving_average(torch.empty(2, 0, 3), 0.5),
        lambda: RunningAverage(torch.empty(0, 3), 0.5),
        lambda: gru_states(torch.empty(0, 2, 4, **DOUBLE), *drawn_gru(4).parameters()),
    ],
    ids=["scan", "average", "running", "gru"],
)
def test_no_steps_are_refused_in_one_line(run) -> None:
    with pytest.raises(ValueError, match="steps: a recurrence over none; at least 1 is needed"):
        run()


def test_a_bf16_scan_forgets_no_small_change_over_many_steps() -> None:
    input_BTX = torch.tensor([-6.0, 1.0]).expand(1, 2000, 2)  # one 400th of the way a step
    fast = gated_scan(input_BTX.bfloat16())[0, -1].item()
    assert fast == pytest.approx(plain_gated_scan(input_BTX)[0, -1].item(), rel=0.005)


def drawn_gru(hidden: int) -> nn.GRU:
    """Return one layer with wide weights, so that its gates leave the middle of their range."""
    gru = nn.GRU(hidden, hidden, **DOUBLE)
    for seed, parameter in enumerate(gru.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed, **DOUBLE)
    return gru


@pytest.mark.parametrize(("steps", "sequences"), [(1, 1), (5, 3), (20, 2)])
def test_the_gru_equals_torch_s_and_so_do_its_gradients(steps: int, sequences: int) -> None:
    gru, input_SNH = drawn_gru(4), drawn(steps, sequences, 4, **DOUBLE).requires_grad_()
    inputs = [input_SNH, *gru.parameters()]
    fast_SNH, (plain_SNH, _) = gru_states(*inputs), gru(input_SNH)
    torch.testing.assert_close(fast_SNH, plain_SNH)
    torch.testing.assert_close(gradients(fast_SNH, inputs), gradients(plain_SNH, inputs))


def test_the_gru_keeps_its_precision_under_autocast() -> None:
    gru, input_SNH = drawn_gru(4).float(), drawn(5, 3, 4).requires_grad_()
    inputs = [input_SNH, *gru.parameters()]
    expected_SNH = gru_states(*inputs)
    expected = gradients(expected_SNH, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        states_SNH = gru_states(*inputs)
        found = gradients(states_SNH, inputs)
    assert torch.equal(states_SNH, expected_SNH)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_norms_equal_torch_s(scale: float) -> None:
    rows = (scale * drawn(3, 5, 8, **DOUBLE)).requires_grad_()
    ours, plain = RMSNorm(8), nn.RMSNorm(8)
    ours.weight.data = plain.weight.data = drawn(8, seed=1, **DOUBLE)
    for fast, slow in ((unit(rows), normalize(rows, dim=-1)), (ours(rows), plain(rows))):
        torch.testing.assert_close(fast, slow)
        torch.testing.assert_close(gradients(fast, [rows]), gradients(slow, [rows]))


def test_a_bf16_norm_of_short_rows_is_that_of_float32() -> None:
    rows = 1e-3 * drawn(5, 8)
    norm = RMSNorm(8)
    torch.testing.assert_close(norm(rows.bfloat16()).float(), norm(rows), rtol=0.02, atol=0.02)


def test_a_zero_row_stays_zero_with_a_finite_gradient() -> None:
    rows = torch.zeros(2, 4, requires_grad=True)
    assert not unit(rows).any()
    assert gradients(unit(rows), [rows])[0].isfinite().all()


def test_unit_rows_of_float16_are_right_where_their_factor_is_out_of_its_range() -> None:
    rows = torch.tensor([[0.0, 0, 0, 0], [3e-6, 0, -4e-6, 0], [3e2, 4e2, 0, 0]]).half()
    expected = torch.tensor([[0.0, 0, 0, 0], [0.6, 0, -0.8, 0], [0.6, 0.8, 0, 0]])
    assert unit(rows).dtype == torch.float16
    # 3e-6 is 50 of the smallest steps of float16.
    torch.testing.assert_close(unit(rows).float(), expected, rtol=0.01, atol=0)
    rows.requires_grad_()
    assert torch.equal(unit(rows), unit(rows.detach()))
    assert not torch.autograd.grad(unit(rows).sum(), rows)[0].isnan().any()


@pytest.mark.parametrize("name", ["gru", "scan", "unit"])
def test_written_gradients_agree_with_differences(name: str) -> None:
    gru = drawn_gru(3)
    calls = {"gru": gru_states, "scan": gated_scan, "unit": unit}
    inputs = [drawn(4, 2, 6, **DOUBLE).requires_grad_()]
    if name == "gru":
        inputs = [drawn(4, 2, 3, **DOUBLE).requires_grad_(), *gru.parameters()]
    assert torch.autograd.gradcheck(calls[name], inputs)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    ones, dropout = torch.ones(401, 501, dtype=dtype), Dropout(p)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = dropout(ones)
        torch.manual_seed(0)
        assert torch.equal(dropout(ones), noisy)
    kept = noisy != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.005)
    assert noisy[kept].unique().tolist() == (
        [] if p == 1 else pytest.approx([1 / (1 - p)], rel=0.01)
    )
    assert torch.equal(dropout.eval()(ones), ones)


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("steps", [*range(1, 31), 63, 64, 67, 97, 200])
def test_the_moving_average_equals_its_definition(decay: float, steps: int) -> None:
    vector_BTD = drawn(2, steps, 3, **DOUBLE)
    expected = []
    for t in range(steps):
        weight = decay ** torch.arange(t, -1, -1, dtype=torch.float64)
        expected.append((weight[:, None] * vector_BTD[:, : t + 1]).sum(dim=1) / weight.sum())
    torch.testing.assert_close(moving_average(vector_BTD, decay), torch.stack(expected, dim=1))


def test_the_moving_average_refuses_vectors_that_need_a_gradient() -> None:
    for steps in (7, 9):  # blocks with a padded step, whole blocks
        with pytest.raises(RuntimeError, match="requires grad"):
            moving_average(drawn(2, steps, 3).requires_grad_(), 0.5)
