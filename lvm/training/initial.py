"""The model that a training starts from."""

from typing import Any

import torch
from torch import nn

from lvm.models.table import build_model, size_names
from lvm.models.tmd_experts import ACTIVE, TMDExperts
from lvm.system.seeding import torch_seed
from lvm.training.config import Settings, as_dict

KIND_OR_NOISE = ("model", "dropout")


def starting_model(config: Settings, dim: int, initial: nn.Module | None) -> nn.Module:
    """Return the model of `config` with the weights of `initial`, without it with seeded ones.

    A head that `initial` lacks is seeded, and adds nothing at first. The trunk is frozen where
    `config` says so.

    Raises:
        ValueError: `initial` is another kind of model, or of another size.
    """
    assert (initial is None) == (config.init is None), "the weights that init names, or none"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.seed, "weights"))
        sizes = _sizes(config, dim)
        if initial is not None and "memory" in initial.config:  # type: ignore[operator]
            sizes["memory"] = initial.config["memory"]  # type: ignore[index]
        model = build_model(sizes)
    if initial is not None:
        _take_over(model, initial, config)
    if config.trunk == "frozen" and isinstance(model, TMDExperts):
        model.freeze_trunk()
    return model


def _sizes(config: Settings, dim: int) -> dict[str, Any]:
    """Return the sizes of the model; the dense control has the active experts' rank in one."""
    own = size_names(config.model) & set(as_dict(config))
    sizes = {name: getattr(config, name) for name in sorted(own)}
    if config.experts_control == "dense":
        sizes |= {"experts": 1, "expert_rank": ACTIVE * config.expert_rank}
    return sizes | {"model": config.model, "dim": dim}


def _take_over(model: nn.Module, initial: nn.Module, config: Settings) -> None:
    """Copy every weight of `initial`; only a head may be missing there."""
    own: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
    given: dict[str, Any] = dict(initial.config)  # type: ignore[arg-type]
    grows = (own["model"], given["model"]) == ("tmd_experts", "memory_gru")
    if own["model"] != given["model"] and not grows:
        raise ValueError(
            f"init: {config.init} is a {given['model']}, from which no {own['model']} can start"
        )
    sizes = [name for name in given if name not in KIND_OR_NOISE]
    wrong = [name for name in sizes if given[name] != own.get(name)]
    if wrong:
        said = ", ".join(f"{name} {given[name]}, here {own.get(name)}" for name in wrong)
        raise ValueError(f"init: {config.init} has {said}; give the same sizes")
    weights = model.state_dict()
    weights.update({k: v.detach().cpu().clone() for k, v in initial.state_dict().items()})
    model.load_state_dict(weights)
