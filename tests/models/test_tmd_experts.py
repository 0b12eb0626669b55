"""Experts over a trunk: where they start, how the gate chooses, what stays frozen.

Shapes: B batch, T time, X experts.
"""

import pytest
import torch

from lvm.models.table import build_model
from lvm.models.tmd_experts import has_gate, top_gates
from tests.models.test_models import DIM, TOY_SIZES, contexts, toy


def test_with_a_dense_trunk_step_0_equals_the_dense_model() -> None:
    dense = toy("memory_gru")
    grown = build_model({"model": "tmd_experts", "dim": DIM} | TOY_SIZES["tmd_experts"]).eval()
    missing, unknown = grown.load_state_dict(dense.state_dict(), strict=False)
    assert unknown == []
    assert {name.partition(".")[0] for name in missing} == {"head"}
    assert torch.equal(grown(contexts()), dense(contexts()))


def test_two_gates_are_above_zero_and_sum_to_1() -> None:
    logit_BTX = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    gate_BTX = top_gates(logit_BTX)
    assert ((gate_BTX > 0).sum(dim=-1) == 2).all()
    torch.testing.assert_close(gate_BTX.sum(dim=-1), torch.ones(3, 5))
    two_BTA = logit_BTX.sort(dim=-1, descending=True).values[..., :2]
    expected_BTA = two_BTA.exp() / two_BTA.exp().sum(dim=-1, keepdim=True)
    torch.testing.assert_close(gate_BTX.sort(descending=True).values[..., :2], expected_BTA)


def test_the_head_sums_what_the_chosen_experts_say() -> None:
    """Against one expert at a time, as the formula is written."""
    head = toy("tmd_experts").head
    recent_E, state_H = torch.randn(2 * DIM), torch.randn(16)
    found_D, logit_X = head(recent_E, state_H)
    feature_F = torch.cat([state_H / state_H.norm(), recent_E])
    torch.testing.assert_close(logit_X, head.gate(feature_F))
    first, second = logit_X.argsort(descending=True)[:2].tolist()
    share = torch.sigmoid(logit_X[first] - logit_X[second])
    expected_D = torch.zeros(DIM)
    for expert, weight in ((first, share), (second, 1 - share)):
        own = slice(expert * head.rank, (expert + 1) * head.rank)
        hidden_R = torch.nn.functional.gelu(head.down.weight[own] @ feature_F)
        expected_D += weight * head.up.weight[:, own] @ hidden_R / head.rank**0.5
    torch.testing.assert_close(found_D, expected_D)


def test_one_expert_has_no_gate_yet_the_parameters_of_two() -> None:
    two, one = toy("tmd_experts"), toy("tmd_experts", experts=1, expert_rank=6)
    assert has_gate(two) and not has_gate(one)
    assert one.routed(contexts())[1] is None
    assert torch.equal(one(contexts()), one.routed(contexts())[0])
    active = sum(2 * map_.weight.numel() // 4 for map_ in (two.head.down, two.head.up))
    assert active == sum(p.numel() for p in one.head.parameters())


def test_a_frozen_trunk_drops_nothing_while_the_head_trains() -> None:
    model = toy("tmd_experts", dropout=0.5)
    model.head.up.weight.data.zero_()
    expected_BTD = model(contexts())
    assert not torch.equal(model.train()(contexts()), expected_BTD)
    model.freeze_trunk()
    assert model.head.training
    torch.testing.assert_close(model(contexts()), expected_BTD)
    torch.testing.assert_close(model.eval().train()(contexts()), expected_BTD)
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"head"}


@pytest.mark.parametrize("name", ["experts", "expert_rank"])
def test_a_head_without_experts_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: 0"):
        build_model({"model": "tmd_experts", "dim": 4, name: 0})
