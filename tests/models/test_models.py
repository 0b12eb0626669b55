"""One suite that every predictor passes, free or trained.

Shapes: B batch, T time, D vector dim.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lvm.models.baselines import MovingAverage
from lvm.models.table import FREE_MODELS, MODELS, TRAINED_MODELS, build_model
from lvm.models.weights import load_model, save_model

DIM = 12
TOY_SIZES = {
    "memory_gru": {"hidden": 16, "layers": 2, "chunk": 7, "slots": 4},
    "delta_memory": {"hidden": 16, "layers": 2},
    "skip": {},
    "transformer": {"hidden": 16, "layers": 2, "chunk": 7},
    "res_mlp": {"hidden": 16, "layers": 1, "last": 5},
    "tmd_experts": {
        **{"hidden": 16, "layers": 2, "chunk": 7, "slots": 4},
        **{"experts": 4, "expert_rank": 3},
    },
    "nn-successor": {"rows": 40},
}
VARIANTS = [(name, {}) for name in MODELS] + [("memory_gru", {"cell": "mingru"})]


def toy(name: str, **sizes: object) -> nn.Module:
    """Return a small predictor, its weights moved off their special starting values."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model({"model": name, "dim": DIM} | TOY_SIZES.get(name, {}) | sizes)
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.data.add_(0.3 * torch.randn_like(tensor))
    return model.eval()


def contexts(batch: int = 3, steps: int = 25, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(batch, steps, DIM, generator=draw), dim=-1)


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
@pytest.mark.parametrize("steps", [1, 6, 7, 8, 25])
def test_predictions_are_unit_vectors_for_any_length(name: str, sizes: dict, steps: int) -> None:
    prediction_BTD = toy(name, **sizes)(contexts(steps=steps))
    assert prediction_BTD.shape == (3, steps, DIM)
    assert prediction_BTD.dtype == torch.float32
    torch.testing.assert_close(prediction_BTD.norm(dim=-1), torch.ones(3, steps))


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
@pytest.mark.parametrize("changed", [1, 7, 13, 24])
def test_no_future_leaks_into_a_prediction(name: str, sizes: dict, changed: int) -> None:
    model, context_BTD = toy(name, **sizes), contexts()
    other_BTD = context_BTD.clone()
    other_BTD[:, changed:] = contexts(seed=1)[:, changed:]
    before, after = model(context_BTD), model(other_BTD)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_a_batch_of_one_equals_a_row_of_a_batch(name: str, sizes: dict) -> None:
    model, context_BTD = toy(name, **sizes), contexts()
    torch.testing.assert_close(model(context_BTD[1:2]), model(context_BTD)[1:2])


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_padding_at_the_end_changes_nothing_before_it(name: str, sizes: dict) -> None:
    model, context_BTD = toy(name, **sizes), contexts()
    padded_BTD = nn.functional.pad(context_BTD, (0, 0, 0, 9))
    torch.testing.assert_close(model(padded_BTD)[:, :25], model(context_BTD))


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_a_reloaded_model_predicts_the_same(name: str, sizes: dict, tmp_path) -> None:
    model, context_BTD = toy(name, **sizes), contexts()
    save_model(model, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model")(context_BTD), model(context_BTD))


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_the_config_rebuilds_the_model(name: str, sizes: dict) -> None:
    model = toy(name, **sizes)
    again = build_model(model.config)  # type: ignore[arg-type]
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in again.state_dict().items()}
    assert again.config == model.config


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_every_parameter_gets_a_gradient(name: str, sizes: dict) -> None:
    model = toy(name, **sizes).train()
    (model(contexts()) * contexts(seed=2)).sum().backward() if name in TRAINED_MODELS else None
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name
    assert (name in FREE_MODELS) == (len(list(model.parameters())) == 0)


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_an_untrained_model_is_the_moving_average(name: str, sizes: dict) -> None:
    if name in FREE_MODELS:
        return
    sizes = {"model": name, "dim": DIM, "decay": 0.4} | TOY_SIZES[name] | sizes
    model = build_model(sizes).eval()
    expected_BTD = MovingAverage(DIM, decay=0.4)(contexts())
    torch.testing.assert_close(model(contexts()), expected_BTD)


def encoded(model: nn.Module, recent_BTE: Tensor) -> Tensor:
    return model.encode(recent_BTE[..., :DIM], recent_BTE)  # type: ignore[operator]


def test_the_memory_carries_an_early_chunk_to_a_late_one() -> None:
    model, context_BTD = toy("memory_gru"), contexts()
    other_BTD = context_BTD.clone()
    other_BTD[:, :7] = contexts(seed=1)[:, :7]
    inputs = [context.repeat(1, 1, 2) for context in (context_BTD, other_BTD)]
    first, second = (encoded(model, recent)[:, 21:] for recent in inputs)
    assert not torch.allclose(first, second)


def test_a_transformer_sees_its_own_block_and_the_one_before() -> None:
    model, context_BTD = toy("transformer", layers=1), contexts()
    recent_BTE = context_BTD.repeat(1, 1, 2)
    for changed, reached in ((0, 13), (6, 13), (7, 20), (20, 24)):
        other_BTE = recent_BTE.clone()
        other_BTE[:, changed] += 1.0
        moved_T = (encoded(model, other_BTE) != encoded(model, recent_BTE)).any(dim=-1).any(dim=0)
        assert moved_T.nonzero().flatten().tolist() == list(range(changed, reached + 1))


def test_a_res_mlp_sees_the_last_vectors_alone() -> None:
    model, context_BTD = toy("res_mlp"), contexts()
    recent_BTE = context_BTD.repeat(1, 1, 2)
    other_BTE = recent_BTE.clone()
    other_BTE[:, 3] += 1.0
    moved_T = (encoded(model, other_BTE) != encoded(model, recent_BTE)).any(dim=-1).any(dim=0)
    assert moved_T.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


def num_parameters(name: str, **sizes: object) -> int:
    model = build_model({"model": name} | sizes)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["transformer", "res_mlp"])
def test_a_rival_is_no_larger_than_the_default_memory_gru(name: str) -> None:
    own, rival = (num_parameters(one, dim=768) for one in ("memory_gru", name))
    assert 0.75 * own < rival <= own


@pytest.mark.parametrize(
    ("hidden", "dim", "larger"),
    [
        (128, 306, set()),
        (128, 384, {"res_mlp"}),
        (512, 1202, set()),
        (512, 1203, {"res_mlp"}),
    ],
)
def test_a_res_mlp_of_wide_vectors_is_the_only_larger_rival(
    hidden: int, dim: int, larger: set[str]
) -> None:
    sizes = {"dim": dim, "hidden": hidden}
    own = num_parameters("memory_gru", **sizes)
    rivals = ("transformer", "res_mlp")
    assert larger == {name for name in rivals if num_parameters(name, **sizes) > own}


def test_the_default_memory_gru_has_about_11_million_parameters() -> None:
    for cell in ("gru", "mingru"):
        model = build_model({"model": "memory_gru", "dim": 768, "cell": cell})
        assert 10.5e6 < sum(p.numel() for p in model.parameters()) < 11.5e6


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model": "lstm", "dim": 4}, "unknown 'lstm'"),
        ({"dim": 4}, "unknown 'none'"),
        ({"model": "ema", "dim": 4, "speed": 1}, "speed"),
        ({"model": "ema", "dim": 4, "decay": 1.5}, "decay: 1.5"),
        ({"model": "skip", "dim": 4, "decay": 1.5}, "decay: 1.5"),
        ({"model": "skip", "dim": 0}, "dim: 0"),
        ({"model": "delta_memory", "dim": 4, "hidden": 40}, "hidden: 40 is not a multiple of 32"),
        ({"model": "memory_gru", "dim": 4, "memory": "tape"}, "memory: unknown 'tape'; known: slo"),
        ({"model": "nn-successor", "dim": 4, "rows": 1}, "rows: 1"),
        ({"model": "memory_gru", "dim": 4, "layers": 3}, "layers: 3"),
        ({"model": "memory_gru", "dim": 4, "slots": 0}, "slots: 0"),
        ({"model": "memory_gru", "dim": 4, "cell": "rnn"}, "cell: unknown 'rnn'"),
        ({"model": "transformer", "dim": 4, "hidden": 7}, "hidden: 7"),
        ({"model": "transformer", "dim": 4, "chunk": 0}, "chunk: 0"),
        ({"model": "res_mlp", "dim": 4, "last": 0}, "last: 0"),
    ],
)
def test_an_impossible_config_is_refused_in_one_line(config: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        build_model(config)
    assert "\n" not in str(caught.value)
