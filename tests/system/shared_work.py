"""Work that torchrun's processes share: `python -m tests.system.shared_work KIND ...`.

ingest SOURCE BANK [die]: shards of 500 rows; with `die` rank 1 kills itself at its second shard.
validate BANK OUTPUT: writes the val figures of an untrained model.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lvm.bank.bank import ShardWriter, open_bank
from lvm.corpus.ingest import VectorShards, write_shards
from lvm.corpus.reading import SourceOptions
from lvm.models.predict import predict_queries
from lvm.models.table import build_model
from lvm.retrieval.exact import exact_ranks
from lvm.retrieval.hubness import fit_hubness
from lvm.system.distributed import joined, launched_rank
from lvm.windows.export import plan_windows

SHARDS = SourceOptions(table_rows=500)


@dataclass(frozen=True)
class DyingWriter(ShardWriter):
    """A writer whose process is killed on rank 1 when it begins its second shard."""

    def write(self, number, blocks, rows, **facts):
        if launched_rank() == 1 and number > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(number, blocks, rows, **facts)


def write(source: str, path: str, *dies: str) -> None:
    kind = DyingWriter if dies else ShardWriter
    writer = kind(Path(path), "drawn", "a test", "float16", SHARDS.table_rows)
    write_shards(writer, VectorShards(source, Path(path), SHARDS))
    print(open_bank(path, verify=True).sha256)


def validate(bank_path: str, output: str) -> None:
    bank = open_bank(bank_path)
    windows = plan_windows(bank, 20)
    torch.manual_seed(0)
    model = build_model(
        {"model": "memory_gru", "dim": bank.dim, "hidden": 8, "layers": 2, "chunk": 5}
    ).eval()
    queries = windows.queries["val"]
    prediction_QD = predict_queries(model, bank, queries)
    correction_N2 = fit_hubness(model, bank, windows).row_correction
    found = exact_ranks(
        prediction_QD, queries, bank, windows.representative_N, (None, correction_N2)
    )
    figures = [one.rank_Q.tolist() for one in found] + [correction_N2.tolist()]
    Path(output).write_text(json.dumps([prediction_QD.tolist(), *figures]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, *arguments = sys.argv[1:]
    try:
        with joined("cpu") as world, world.assisted() as leads:
            if leads:
                {"ingest": write, "validate": validate}[kind](*arguments)
    except ConnectionError as error:
        sys.exit(f"error: {error}")
