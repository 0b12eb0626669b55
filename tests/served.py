"""A working folder whose baseline can be served, as several tests of serving need it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, open_bank, write_bank
from lvm.corpus.encoders import load_encoder
from lvm.models.baselines import MovingAverage
from lvm.models.facts import facts_of
from lvm.retrieval.rerank import Reranker
from lvm.tracking import logged_models, runs
from lvm.tracking.registry import Registry
from lvm.windows.export import plan_windows
from tests.conftest import copy_store

registry = Registry()
WORDS = "the sum of an array over its axis is a number with the type of all elements".split()


def text_bank(folder: Path) -> Bank:
    """Write a bank of wordllama's vectors: 10 documents of 40 sentences."""
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, 8)) for _ in range(400)]
    names = {"sequence": "book", "document": [f"page {n // 40}" for n in range(400)]}
    vectors = load_encoder("wordllama").encode(texts)
    write_bank(folder, vectors, pd.DataFrame(names | {"text": texts}), encoder="wordllama")
    return open_bank(folder)


@contextmanager
def baseline_of(
    bank: Bank, empty_store: Path, reranker: Reranker | None = None
) -> Iterator[pytest.MonkeyPatch]:
    """Make a moving average the baseline in the folder of `bank`, the working folder of the block.

    Pickle is switched off; the patch undoes all of it, and what its user adds.
    """
    folder = bank.path.parent
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder / "store", patch)
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(folder)
        facts = facts_of("ema", "none", bank, plan_windows(bank, 50))
        with runs.run("train", {}):
            model_id = logged_models.log_predictor(
                MovingAverage(bank.dim), facts, reranker=reranker
            )
            version = registry.register(model_id, facts)
        registry.promote(version, None, {})
        yield patch
