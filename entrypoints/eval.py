"""Command: exact ranks of a predictor over the whole bank."""

import sys

import numpy as np

from entrypoints._measuring import MEASURED, MeasureOptions, measure
from entrypoints._options import EntryPoint
from entrypoints._reports import publish
from lvm import tracking
from lvm.report import evaluation_table


def body(options: MeasureOptions) -> None:
    """Rank the true next passage among all rows of a bank, for a predictor and the free ones."""
    measurement = measure(options)
    own = measurement.evaluations[0]
    tracking.log_file("per_query.parquet", own.per_query.to_parquet)
    tracking.log_file(MEASURED, measurement.long_table().to_parquet)
    tracking.log_file("predictions.npy", lambda path: np.save(path, own.predictions))
    tracking.log_file("row_correction.npy", lambda path: np.save(path, own.row_correction))
    table = evaluation_table(measurement.report)
    tracking.log_text(table + "\n", "eval.txt")
    print(table)
    publish(measurement.report, options.report)


main = EntryPoint("eval", MeasureOptions, body)

if __name__ == "__main__":
    sys.exit(main())
