"""What the gate of a batch is told about its lanes.

Shapes: B windows of a batch, T time, N bank rows, L lanes, X experts.
"""

import numpy as np
import torch

from lvm.bank.store import UNASSIGNED, Bank
from lvm.training.batches import Batch, Batches
from lvm.training.config import Settings
from lvm.training.gate_lanes import expert_prior, lane_experts, permuted_lanes, train_lanes
from lvm.training.gate_losses import GateLoss, Told
from lvm.windows.planning import Windows


class Guidance:
    """The lanes of every target, with a weight that falls linearly to 0 over all steps.

    A bank without lanes leaves the gate to the balance, at equal shares.

    Raises:
        ValueError: lanes are to be permuted in a bank that has none.
    """

    def __init__(
        self, bank: Bank, windows: Windows, batches: Batches, config: Settings, total_steps: int
    ) -> None:
        self._batches, self._config, self._total_steps = batches, config, total_steps
        self._num_lanes = len(bank.lanes)
        self._lane_N = train_lanes(bank, windows)
        if config.experts_control == "permuted":
            if self._num_lanes < 2:
                raise ValueError(f"experts_control: bank {bank.path} has no two lanes to permute")
            self._lane_N = permuted_lanes(self._lane_N, bank.document_N, config.seed)

    def loss(self) -> GateLoss:
        """Return the loss of the gate, balanced to the lanes of the train rows."""
        num_experts, config = self._config.experts, self._config
        prior_X = expert_prior(self._lane_N, self._num_lanes, num_experts)
        belongs_LX = np.zeros((0, num_experts), dtype=bool)
        if self._num_lanes:
            belongs_LX = lane_experts(self._num_lanes, num_experts)
        tensors = torch.from_numpy(prior_X), torch.from_numpy(belongs_LX)
        return GateLoss(*tensors, config.gate_balance, config.gate_z)

    def of_batch(self, batch: Batch, step: int) -> Told:
        """Return what the gate is told of a batch at optimiser step `step`."""
        lane_BT = np.full(batch.real_BT.shape, UNASSIGNED, dtype=np.int64)
        for place, window in enumerate(batch.window_B):
            start, num_rows = self._batches.extent(window)
            lane_BT[place, :num_rows] = self._lane_N[start + 1 : start + num_rows + 1]
        weight = self._config.gate_lanes * (1 - step / self._total_steps)
        return Told(torch.from_numpy(lane_BT), weight)
