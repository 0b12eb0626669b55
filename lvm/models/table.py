"""All predictors by name, their size classes, and `build_model`."""

from collections.abc import Mapping
from dataclasses import fields

from torch import nn

from lvm.models.baselines import (
    ContextMean,
    ContextRidge,
    CopyLast,
    MovingAverage,
    NearestSuccessor,
    Ridge,
)
from lvm.models.delta_memory import DeltaMemory, DeltaMemoryConfig
from lvm.models.memory_gru import MemoryGRU, MemoryGRUConfig
from lvm.models.skip import ResMLP, ResMLPConfig, Skip, SkipConfig
from lvm.models.tmd_experts import TMDExperts, TMDExpertsConfig
from lvm.models.transformer import Transformer, TransformerConfig

FREE_MODELS: dict[str, type[nn.Module]] = {
    "copy-last": CopyLast,
    "ema": MovingAverage,
    "context-mean": ContextMean,
    "ridge": Ridge,
    "nn-successor": NearestSuccessor,
    "context-ridge": ContextRidge,
}
TRAINED_MODELS: dict[str, type[nn.Module]] = {
    "memory_gru": MemoryGRU,
    "delta_memory": DeltaMemory,
    "skip": Skip,
    "transformer": Transformer,
    "res_mlp": ResMLP,
    "tmd_experts": TMDExperts,
}
SIZES = {
    "memory_gru": MemoryGRUConfig,
    "delta_memory": DeltaMemoryConfig,
    "skip": SkipConfig,
    "transformer": TransformerConfig,
    "res_mlp": ResMLPConfig,
    "tmd_experts": TMDExpertsConfig,
}
MODELS = FREE_MODELS | TRAINED_MODELS


def build_model(config: Mapping[str, object]) -> nn.Module:
    """Return an untrained predictor for `config`: its `model` name, `dim` and other sizes.

    Raises:
        ValueError: the name is unknown, or the sizes do not fit the predictor.
    """
    sizes = dict(config)
    name = str(sizes.pop("model", "none"))
    if name not in MODELS:
        raise ValueError(f"model: unknown '{name}'; known: {', '.join(MODELS)}")
    try:
        return MODELS[name](**sizes)
    except MemoryError as error:
        raise _too_large(name, sizes) from error
    except (TypeError, ArithmeticError, RuntimeError, AttributeError, LookupError) as error:
        if "allocate memory" in str(error):  # torch has no kind of its own for it on a CPU
            raise _too_large(name, sizes) from error
        raise ValueError(f"model: {name} cannot be built from {sizes}: {error}") from error


def _too_large(name: str, sizes: Mapping[str, object]) -> ValueError:
    return ValueError(
        f"model: {name} of hidden {sizes.get('hidden')} and layers {sizes.get('layers')} is larger "
        "than this machine's memory; choose a smaller hidden, or fewer layers"
    )


def size_names(name: str) -> set[str]:
    """Return the names of the sizes that the trained predictor `name` has."""
    return {field.name for field in fields(SIZES[name])}
