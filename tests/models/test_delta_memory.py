"""The gated delta rule against its definition, the gradients that reach every memory's writes.

Shapes: B batch, T time, A heads, R key features, V value features.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lvm.models.delta_memory import MAX_BLOCK, RECALL_HEADS, delta_rule, delta_step
from lvm.models.skip import without
from lvm.models.table import build_model
from tests.models.test_models import DIM, TOY_SIZES, contexts, toy

BATCH, HEADS, KEYS, VALUES = 2, 3, 5, 4


def drawn(num_steps: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return query, key, value, strength and log keep of `num_steps` steps."""
    draw = torch.Generator().manual_seed(num_steps)

    def normal(*shape: int) -> Tensor:
        shape = (BATCH, num_steps, HEADS, *shape)
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    query, key = normalize(normal(KEYS), dim=-1), normalize(normal(KEYS), dim=-1)
    return query, key, normal(VALUES), normal().sigmoid(), -(normal() - 1).exp()


def step_by_step(
    query: Tensor, key: Tensor, value: Tensor, strength: Tensor, log_keep: Tensor, state: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return reads and last memory by the definition, in float64."""
    query_, key_, value_, b_, a_ = (
        part.double().numpy() for part in (query, key, value, strength, log_keep.exp())
    )
    memory, reads = state.double().numpy().copy(), np.zeros(value.shape)
    for step in range(query.shape[1]):
        for place in np.ndindex(BATCH, HEADS):
            at = place[0], step, place[1]
            kept = a_[at] * memory[place]
            missed = value_[at] - kept @ key_[at]
            memory[place] = kept + b_[at] * np.outer(missed, key_[at])
            reads[at] = memory[place] @ query_[at]
    return reads, memory


@pytest.mark.parametrize(
    "num_steps", [1, 2, MAX_BLOCK - 1, MAX_BLOCK, MAX_BLOCK + 1, 2 * MAX_BLOCK, 150]
)
def test_blocks_equal_the_rule_step_by_step(num_steps: int) -> None:
    parts = drawn(num_steps)
    first = torch.zeros(BATCH, HEADS, VALUES, KEYS)
    for state in (None, torch.randn(first.shape, generator=torch.Generator().manual_seed(0))):
        read, last = delta_rule(*parts, state)
        expected_read, expected_last = step_by_step(*parts, first if state is None else state)
        np.testing.assert_allclose(read.numpy(), expected_read, rtol=0, atol=3e-6)
        np.testing.assert_allclose(last.numpy(), expected_last, rtol=0, atol=3e-6)


def test_a_sequence_may_be_cut_anywhere() -> None:
    parts = drawn(150)
    whole, last = delta_rule(*parts)
    state, reads = None, []
    for begin, end in ((0, 1), (1, 70), (70, 150)):
        read, state = delta_rule(*(part[:, begin:end] for part in parts), state)
        reads.append(read)
    torch.testing.assert_close(torch.cat(reads, dim=1), whole, rtol=0, atol=3e-6)
    torch.testing.assert_close(state, last, rtol=0, atol=3e-6)


def test_a_step_equals_the_last_step_of_a_block() -> None:
    parts = drawn(20)
    _, before = delta_rule(*(part[:, :-1] for part in parts))
    read, last = delta_rule(*parts)
    for batch in range(BATCH):
        one = delta_step(*(part[batch, -1] for part in parts), before[batch])
        torch.testing.assert_close(one[0], read[batch, -1], rtol=0, atol=3e-6)
        torch.testing.assert_close(one[1], last[batch], rtol=0, atol=3e-6)


def test_a_memory_that_keeps_everything_stays_bounded() -> None:
    """The sum of as many outer products would have a length of about 70 a head."""
    query, key, value, strength, log_keep = drawn(5000)
    value = normalize(value, dim=-1)
    for b in (torch.ones_like(strength), strength):
        read, last = delta_rule(query, key, value, b, torch.zeros_like(log_keep))
        assert float(last.flatten(2).norm(dim=-1).max()) < 2 * KEYS
        assert float(read.norm(dim=-1).max()) < 2 * KEYS
    same = key[:, :1].expand_as(key)  # one key, written 5,000 times: the last value stands
    read, _ = delta_rule(same, same, value, torch.ones_like(strength), torch.zeros_like(log_keep))
    torch.testing.assert_close(read, value, rtol=0, atol=1e-5)


def test_what_was_written_is_read_again_until_it_decays() -> None:
    key = torch.eye(KEYS)[None, :, None].expand(1, KEYS, 1, KEYS)
    value = torch.randn(1, KEYS, 1, VALUES, generator=torch.Generator().manual_seed(0))
    ones, kept = torch.ones(1, KEYS, 1), torch.full((1, KEYS, 1), -0.5)
    _, last = delta_rule(key, key, value, ones, 0 * ones)
    torch.testing.assert_close(last[0, 0].T, value[0, :, 0])
    _, faded = delta_rule(key, key, value, ones, kept)
    shares = torch.exp(-0.5 * torch.arange(KEYS - 1.0, -1, -1))
    torch.testing.assert_close(faded[0, 0].T, shares[:, None] * value[0, :, 0])


WRITES = {
    "memory_gru": ("memory.slot_query", "memory.step_key", "memory.step_value", "memory.keep"),
    "delta_memory": (
        *("layers.0.key", "layers.0.value", "layers.0.rates", "layers.1.key", "layers.1.rates"),
        *("recall.key", "recall.rates"),
    ),
}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("memory_gru", {}), ("memory_gru", {"cell": "mingru"}), ("delta_memory", {})],
)
def test_gradients_of_later_rows_reach_the_writes(name: str, sizes: dict) -> None:
    """W_out starts as zero, so three steps are taken first; the last four rows alone are asked."""
    context_BTD, target_BTD = contexts(), contexts(seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model({"model": name, "dim": DIM} | TOY_SIZES[name] | sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        lost_BT = -(model(context_BTD) * target_BTD).sum(dim=-1)
        lost_BT[:, -4:].sum().backward()
        found = {key: float(p.grad.norm()) for key, p in model.named_parameters()}
        optimizer.step()
    for write in WRITES[name]:
        assert found[f"{write}.weight"] > 1e-7, write


def zeroed(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        nn.init.zeros_(model.get_parameter(name))
    return model


@pytest.mark.parametrize("name", ["memory_gru", "delta_memory", "transformer", "res_mlp", "skip"])
def test_without_a_part_the_others_predict_as_they_did(name: str) -> None:
    model, context_BTD = toy(name), contexts()
    full_BTD = model(context_BTD)
    for part in model.ablations:
        ablated_BTD = without(model, part)(context_BTD)
        assert not torch.allclose(ablated_BTD, full_BTD, atol=1e-4), part
    assert torch.equal(model(context_BTD), full_BTD), "the model itself is whole"
    silent = zeroed(toy(name), "skip_change.weight")
    torch.testing.assert_close(without(model, "linear")(context_BTD), silent(context_BTD))
    with pytest.raises(ValueError, match="part: 'gate' is not among linear"):
        without(model, "gate")


def test_without_a_memory_nothing_is_read_from_it() -> None:
    model, context_BTD = toy("memory_gru"), contexts()
    silent = zeroed(toy("memory_gru"), "memory.read_value.weight", "memory.read_value.bias")
    expected_BTD = silent(context_BTD)
    torch.testing.assert_close(without(model, "memory")(context_BTD), expected_BTD)


def test_without_recall_or_encoder_their_maps_add_nothing() -> None:
    model, context_BTD = toy("delta_memory"), contexts()
    silent = toy("delta_memory")
    with torch.no_grad():
        silent.recall.rates.weight[-RECALL_HEADS:] = 0
        silent.recall.rates.bias[-RECALL_HEADS:] = 0
    torch.testing.assert_close(without(model, "recall")(context_BTD), silent(context_BTD))
    zeroed(silent, "project_out.weight")
    torch.testing.assert_close(without(model, "encoder")(context_BTD), silent(context_BTD))


@pytest.mark.parametrize("name", ["memory_gru", "delta_memory", "tmd_experts", "skip"])
def test_every_parameter_belongs_to_one_part(name: str) -> None:
    model = toy(name)
    parts = [id(parameter) for part in model.parts().values() for parameter in part]
    assert sorted(parts) == sorted(id(parameter) for parameter in model.parameters())
