"""The options of every command, which are declared without loading what the commands need."""

from typing import Any

from entrypoints.options.data import ExportOptions, IngestOptions, MainOptions
from entrypoints.options.evaluation import (
    EvalOptions,
    LaneOptions,
    PredictOptions,
    PromoteOptions,
    RollbackOptions,
    ShadowOptions,
)
from entrypoints.options.training import PhasesOptions, ScalingOptions, TrainOptions, TuneOptions

OPTIONS: dict[str, type[Any]] = {
    "main": MainOptions,
    "ingest": IngestOptions,
    "export": ExportOptions,
    "train": TrainOptions,
    "eval": EvalOptions,
    "lane-diagnostics": LaneOptions,
    "shadow-eval": ShadowOptions,
    "tune": TuneOptions,
    "scaling": ScalingOptions,
    "phases": PhasesOptions,
    "promote": PromoteOptions,
    "rollback": RollbackOptions,
    "predict": PredictOptions,
}
