"""Named generators are reproducible and independent of each other."""

import numpy as np
import torch

from lvm.system.seeding import generator, torch_seed


def test_the_same_name_repeats_and_another_does_not() -> None:
    first = generator(3, "queries").random(4)
    assert np.array_equal(first, generator(3, "queries").random(4))
    assert not np.array_equal(first, generator(3, "bootstrap").random(4))
    assert not np.array_equal(first, generator(4, "queries").random(4))


def test_torch_generators_leave_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    torch.rand(3, generator=torch.Generator().manual_seed(torch_seed(0, "weights")))
    assert torch.equal(before, torch.random.get_rng_state())
