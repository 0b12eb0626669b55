"""Streams against the windowed predictions of the same rows.

Shapes: T time, D vector dim.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lvm.bank.bank import Bank
from lvm.models import memory_gru
from lvm.models.memory_gru import SlotMemory
from lvm.models.predict import laid_out_for_steps, open_stream, predict_queries, unit_contexts
from lvm.models.table import MODELS, build_model
from lvm.windows.planning import make_queries

DIM, CHUNK, ROWS = 12, 8, 37  # four whole chunks, one of five rows
TOY = {
    "memory_gru": {"hidden": 16, "layers": 4, "chunk": CHUNK, "slots": 4},
    "delta_memory": {"hidden": 16, "layers": 2},
    "transformer": {"hidden": 16, "layers": 2, "chunk": CHUNK},
    "res_mlp": {"hidden": 16, "layers": 1, "last": 5},
    "tmd_experts": {
        **{"hidden": 16, "layers": 4, "chunk": CHUNK, "slots": 4},
        **{"experts": 4, "expert_rank": 3},
    },
    "nn-successor": {"rows": 40},
}
VARIANTS = [(name, {}) for name in MODELS] + [("memory_gru", {"cell": "mingru"})]
VARIANTS += [("memory_gru", {"memory": "addressed"})]
# float32 rounding of the entries: beside float64, windows err by 2.1e-6, streams by 0.6e-6.
TOLERANCE = 4e-6


def toy(name: str, sizes: dict, dim: int = DIM) -> nn.Module:
    """Return a small predictor, its weights moved off their special starting values."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model({"model": name, "dim": dim} | TOY.get(name, {}) | sizes)
        for tensor in filter(Tensor.is_floating_point, [*model.parameters(), *model.buffers()]):
            tensor.data.add_(0.3 * torch.randn_like(tensor))
    return model.eval()


def rows(num_rows: int = ROWS, dim: int = DIM) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return normalize(torch.randn(num_rows, dim, generator=draw), dim=-1)


def windowed(model: nn.Module, context_TD: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model(context_TD[None])[0].numpy()


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_appending_row_by_row_equals_one_window(name: str, sizes: dict) -> None:
    model, context_TD = toy(name, sizes), rows()
    stream = open_stream(model)
    streamed_TD = np.stack([stream.append(vector_D) for vector_D in context_TD.numpy()])
    np.testing.assert_allclose(streamed_TD, windowed(model, context_TD), rtol=0, atol=TOLERANCE)
    assert streamed_TD.dtype == np.float32
    assert stream.num_rows == ROWS


@pytest.mark.parametrize("warm_rows", [1, 7, 8, 9, 16, 17, 36])
@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_a_warm_stream_goes_on_as_if_it_had_read_every_row(
    name: str, sizes: dict, warm_rows: int
) -> None:
    model, context_TD = toy(name, sizes), rows()
    stream = open_stream(model)
    first_D = stream.warm(context_TD[:warm_rows].numpy())
    later_TD = [stream.append(vector_D) for vector_D in context_TD[warm_rows:].numpy()]
    expected_TD = windowed(model, context_TD)[warm_rows - 1 :]
    np.testing.assert_allclose([first_D, *later_TD], expected_TD, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_a_bounded_stream_equals_the_evaluation_of_every_row(
    tiny_bank: Bank, name: str, sizes: dict
) -> None:
    model = toy(name, sizes, tiny_bank.dim)
    target_row_Q = np.arange(1, 60)
    queries = make_queries(np.arange(59), target_row_Q, np.zeros(59, np.int64), ctx=20)
    stream = open_stream(model, ctx=20)
    streamed_QD = [stream.append(vector_D) for vector_D in tiny_bank.unit(slice(0, 59))]
    expected_QD = predict_queries(model, tiny_bank, queries)
    np.testing.assert_allclose(streamed_QD, expected_QD, rtol=0, atol=TOLERANCE)
    assert stream.num_rows <= 20
    warmed_D = open_stream(model, ctx=20).warm(tiny_bank.unit(slice(0, 59)))
    np.testing.assert_allclose(warmed_D, expected_QD[-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cell", ["gru", "mingru"])
def test_an_append_never_reads_the_context_again(cell: str, monkeypatch) -> None:
    model, seen = toy("memory_gru", {"cell": cell}), []
    stream = open_stream(model)
    stream.warm(rows(30).numpy())
    read = SlotMemory.read
    monkeypatch.setattr(nn.Linear, "forward", counted(seen, nn.Linear.forward))
    monkeypatch.setattr(SlotMemory, "read", lambda *parts: seen.append(1) or read(*parts))
    stream.append(rows()[30].numpy())
    assert max(seen) <= model.sizes.slots  # rows that any map saw at once


@pytest.mark.parametrize("name", ["memory_gru", "transformer"])
def test_a_chunk_beyond_every_context_takes_no_memory_for_its_rows(name: str) -> None:
    model, context_TD = toy(name, {"chunk": 10**14}), rows()
    stream = open_stream(model)
    stream.warm(context_TD[:-1].numpy())
    expected_D = windowed(model, context_TD)[-1]
    streamed_D = stream.append(context_TD[-1].numpy())
    np.testing.assert_allclose(streamed_D, expected_D, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("warm_rows", [1, 5, 20])
def test_the_room_of_a_chunk_grows_with_its_rows(warm_rows: int, monkeypatch) -> None:
    monkeypatch.setattr(memory_gru, "ROOM", 1)
    model, context_TD = toy("memory_gru", {"chunk": 11}), rows()
    stream = open_stream(model)
    first_D = stream.warm(context_TD[:warm_rows].numpy())
    later_TD = [stream.append(vector_D) for vector_D in context_TD[warm_rows:].numpy()]
    expected_TD = windowed(model, context_TD)[warm_rows - 1 :]
    np.testing.assert_allclose([first_D, *later_TD], expected_TD, rtol=0, atol=TOLERANCE)


def counted(seen: list[int], forward):
    """Return a `forward` that notes how many vectors it is given."""

    def counting(self: nn.Linear, input: Tensor) -> Tensor:
        seen.append(input.numel() // input.shape[-1])
        return forward(self, input)

    return counting


def test_the_length_of_a_vector_does_not_matter() -> None:
    model, vector_TD = toy("ridge", {}), rows().numpy()
    one, other = open_stream(model), open_stream(model)
    one.warm(vector_TD), other.warm(7 * vector_TD)
    left_D, right_D = one.append(vector_TD[0]), other.append(0.2 * vector_TD[0])
    np.testing.assert_allclose(left_D, right_D, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e20, 1e37])
def test_vectors_of_extreme_length_are_read_as_predict_reads_them(scale: float) -> None:
    model, vector_TD = toy("memory_gru", {}), rows().numpy() * np.float32(scale)
    expected_TD = windowed(model, torch.from_numpy(unit_contexts(vector_TD[None], DIM)[0]))
    stream = open_stream(model)
    streamed_TD = [stream.warm(vector_TD[:9]), *(stream.append(row_D) for row_D in vector_TD[9:])]
    np.testing.assert_allclose(streamed_TD, expected_TD[8:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        (np.zeros(DIM), "zero vector"),
        (np.full(DIM, np.nan), "NaN or infinite"),
        (np.ones(DIM + 1), "is not"),
        (np.ones((1, DIM)), "is not"),
    ],
)
def test_a_vector_without_a_direction_leaves_the_stream_as_it_was(vector, reason) -> None:
    model, context_TD = toy("memory_gru", {}), rows().numpy()
    stream = open_stream(model)
    stream.warm(context_TD[:-1])
    with pytest.raises(ValueError, match=reason):
        stream.append(vector)
    expected_D = windowed(model, torch.from_numpy(context_TD))[-1]
    np.testing.assert_allclose(stream.append(context_TD[-1]), expected_D, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("ctx", [None, 20])
def test_a_pass_that_fails_leaves_the_stream_as_it_was(monkeypatch, ctx: int | None) -> None:
    model, context_TD = toy("memory_gru", {}), rows().numpy()
    stream, other = open_stream(model, ctx), open_stream(model, ctx)
    stream.warm(context_TD[:18]), other.warm(context_TD[:18])

    def fail(*parts: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(type(model), "begin", fail)
        stream.warm(context_TD[18:])
    for vector_D in context_TD[18:24]:  # with a bound, the rows are read again on the way
        np.testing.assert_array_equal(stream.append(vector_D), other.append(vector_D))


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_a_stream_keeps_no_more_memory_after_a_longer_context(name: str, sizes: dict) -> None:
    model, kept = toy(name, sizes), []
    for num_rows in (6 * CHUNK, 12 * CHUNK):
        with torch.inference_mode():
            cache = model.begin(rows(num_rows))[1]
        kept.append(sum(storages(cache).values()))
    assert kept[0] == kept[1]


def storages(part: object) -> dict[int, int]:
    """Return the bytes of every block of memory that a cache keeps alive, by its address."""
    if isinstance(part, Tensor):
        return {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()}
    inner = part if isinstance(part, list | tuple) else vars(part).values() if part else ()
    found: dict[int, int] = {}
    for one in inner:
        if not isinstance(one, int | float):
            found |= storages(one)
    return found


@pytest.mark.parametrize("decay", [1e-25, 0.99])
def test_a_stream_agrees_whatever_the_decay(decay: float) -> None:
    model, context_TD = toy("memory_gru", {"decay": decay}), rows()
    stream = open_stream(model)
    streamed_TD = [stream.append(vector_D) for vector_D in context_TD.numpy()]
    np.testing.assert_allclose(streamed_TD, windowed(model, context_TD), rtol=0, atol=TOLERANCE)


def test_the_layout_for_steps_changes_no_value_and_is_made_once() -> None:
    model = toy("memory_gru", {})
    turned = laid_out_for_steps(model)
    assert laid_out_for_steps(turned) is turned is not model
    assert model.lower.gru.weight_ih_l0.is_contiguous()
    for key, weight in turned.state_dict().items():
        assert torch.equal(weight, model.state_dict()[key])
    free = toy("ema", {})
    assert laid_out_for_steps(free) is free


def test_an_impossible_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="ctx: 0"):
        open_stream(toy("ema", {}), ctx=0)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["gru", "mingru"])
def test_2000_rows_at_the_default_size_agree(cell: str) -> None:
    model = toy("memory_gru", {"cell": cell, "hidden": 512, "layers": 4, "chunk": 200}, dim=768)
    for parameter in model.parameters():
        parameter.data.mul_(0.2)  # drawn wide for the toy; 512 inputs need less
    context_TD = rows(2000, 768)
    expected_TD = windowed(model, context_TD)
    stream = open_stream(model)
    stream.warm(context_TD[:1390].numpy())
    streamed_TD = [stream.append(vector_D) for vector_D in context_TD[1390:].numpy()]
    np.testing.assert_allclose(streamed_TD, expected_TD[1390:], rtol=0, atol=TOLERANCE)
