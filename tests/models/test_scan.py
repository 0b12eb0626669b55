"""The scans against plain loops."""

import pytest
import torch

from lvm.models.scan import moving_average, recurrence_loop, recurrence_scan


@pytest.mark.parametrize(("steps", "chunk"), [(1, 5), (4, 5), (5, 5), (6, 5), (77, 20), (64, 1)])
def test_the_chunked_scan_equals_the_loop(steps: int, chunk: int) -> None:
    draw = torch.Generator().manual_seed(steps)
    gate_BTH = torch.rand(2, steps, 3, generator=draw, dtype=torch.float64)
    value_BTH = torch.randn(2, steps, 3, generator=draw, dtype=torch.float64)
    expected = recurrence_loop(gate_BTH, value_BTH)
    torch.testing.assert_close(recurrence_scan(gate_BTH, value_BTH, chunk), expected)


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 63, 64, 65, 200])
def test_the_moving_average_equals_its_definition(decay: float, steps: int) -> None:
    draw = torch.Generator().manual_seed(0)
    vector_BTD = torch.randn(2, steps, 3, generator=draw, dtype=torch.float64)
    expected = []
    for t in range(steps):
        weight = decay ** torch.arange(t, -1, -1, dtype=torch.float64)
        expected.append((weight[:, None] * vector_BTD[:, : t + 1]).sum(dim=1) / weight.sum())
    torch.testing.assert_close(moving_average(vector_BTD, decay), torch.stack(expected, dim=1))
