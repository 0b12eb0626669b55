"""Drawn banks on which only a memory can predict the next row: test data for models with memory.

`python -m benchmarks.drawn_banks echo-300 data/echo --asked asked.parquet` writes one for the entry
points, and the log of its questions, for `shadow-eval -P queries=asked.parquet`.

Shapes: N rows, D vector dim, S sequences, L rows of a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lvm.bank.bank import Bank, write_bank
from lvm.system.seeding import generator
from lvm.windows.export import plan_windows

REGIME_DIM = 32
DIM = 128  # for all other banks
QUESTION_DIM = 16
NOISE = 0.3  # length of the noise on a repeated vector: its cosine with the original is 0.96
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Drawn:
    """A drawn bank in memory.

    `answer_ND` is the best prediction of each row by an oracle that knows the drawing process and
    remembers all rows; zero if nothing helps. `reach_N` is how many rows back the oracle must look,
    0 if nothing helps. Documents are runs of a sequence's rows.
    """

    vector_ND: Array
    answer_ND: Array
    reach_N: NDArray[np.int64]
    sequence_N: NDArray[np.int64]
    document_N: NDArray[np.int64]

    def write(self, path: str | Path) -> Bank:
        """Write the bank to the folder `path`."""
        table = pd.DataFrame(
            {
                "sequence": [f"sequence-{code}" for code in self.sequence_N],
                "document": [f"document-{code}" for code in self.document_N],
            }
        )
        return write_bank(path, self.vector_ND, table, "drawn", "benchmarks/drawn_banks.py")


def regimes(num_maps: int, noise: float = 0.9, *, sequences: int = 64, rows: int = 1000) -> Drawn:
    """x_{t+1} = unit(R x_t + n), R one of `num_maps` random rotations for a whole sequence.

    The noise n has a length of about `noise`. The rotation is not announced; a model has to infer
    it from the rows.
    """
    random = generator(0, f"regimes {num_maps} {noise}")
    map_MDD = np.stack([_rotation(random, REGIME_DIM) for _ in range(num_maps)])
    vector_SLD = np.empty((sequences, rows, REGIME_DIM))
    answer_SLD = np.zeros_like(vector_SLD)
    own_SDD = map_MDD[np.arange(sequences) % num_maps]
    vector_SLD[:, 0] = _unit(random.standard_normal((sequences, REGIME_DIM)))
    for row in range(1, rows):
        answer_SLD[:, row] = np.einsum("sde,se->sd", own_SDD, vector_SLD[:, row - 1])
        vector_SLD[:, row] = _noisy(answer_SLD[:, row], noise, random)
    reach_SL = np.full((sequences, rows), 1)
    reach_SL[:, 0] = 0
    return _drawn(vector_SLD, answer_SLD, reach_SL, 20)


def echo(distance: int, *, sequences: int = 48, rows: int = 4000) -> Drawn:
    """A payload follows a tag row; `distance` rows later tag and payload appear again.

    All other rows are independent. Sixteen tags are reused in turn, so a memory has to hold at most
    twelve payloads and to forget one when its tag is reused.
    """
    random = generator(0, f"echo {distance}")
    spacing = max(10, distance // 12 + 3)
    vector_SLD, tag_KD = _filler(random, sequences, rows), _tags(random, 16)
    answer_SLD = np.zeros_like(vector_SLD)
    reach_SL = np.zeros((sequences, rows), dtype=np.int64)
    for sequence in range(sequences):
        taken = np.zeros(rows + distance + 2, dtype=bool)
        next_row, tag = int(random.integers(spacing)), 0
        while next_row + distance + 1 < rows:
            places = [next_row, next_row + 1, next_row + distance, next_row + distance + 1]
            if not taken[places].any():
                taken[places] = True
                for place in (next_row, next_row + distance):
                    vector_SLD[sequence, place] = _noisy(tag_KD[tag % 16], NOISE, random)
                payload_D = vector_SLD[sequence, next_row + 1]
                asked = next_row + distance + 1
                vector_SLD[sequence, asked] = _noisy(payload_D, NOISE, random)
                answer_SLD[sequence, asked] = payload_D
                reach_SL[sequence, asked] = distance
                tag += 1
                next_row += spacing
            else:
                next_row += 1
    return _drawn(vector_SLD, answer_SLD, reach_SL, 40)


def announced_key(*, sequences: int = 1500) -> Drawn:
    """The first ten rows announce one of eight keys, which decides how the question is answered.

    After a gap of 5 to 600 independent rows comes the question, a row with the question mark and a
    random part of `QUESTION_DIM` features; the next and last row is that part moved by the shift of
    the key. A second question would be answered by what the first answer shows of the shift.
    Sequences go whole to one split.
    """
    random = generator(0, "announced key")
    key_KD, shift_KE = _tags(random, 8), _unit(random.standard_normal((8, QUESTION_DIM)))
    parts = []
    for sequence in range(sequences):
        asked = 10 + int(5 * 120 ** random.random())
        rows, key = asked + 2, int(random.integers(8))
        vector_LD = _filler(random, 1, rows)[0]
        answer_LD, reach_L = np.zeros_like(vector_LD), np.zeros(rows, dtype=np.int64)
        vector_LD[:10] = _noisy(np.repeat(key_KD[key : key + 1], 10, axis=0), NOISE, random)
        question_E = _unit(random.standard_normal(QUESTION_DIM))
        vector_LD[asked] = 0.0
        vector_LD[asked, 1], vector_LD[asked, -QUESTION_DIM:] = 0.6, 0.8 * question_E
        # With a shift of length 1.5 every third answer is found without the key.
        answer_LD[-1, -QUESTION_DIM:] = _unit(question_E + 2 * shift_KE[key])
        vector_LD[-1] = _noisy(answer_LD[-1], NOISE, random)
        reach_L[-1] = asked + 1
        document_L = 9 * sequence + np.arange(rows) * 9 // rows
        parts.append((vector_LD, answer_LD, reach_L, np.full(rows, sequence), document_L))
    return Drawn(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def returning_topic(*, sequences: int = 32, rows: int = 4000) -> Drawn:
    """Topics of ten rows; 500 rows or more after a topic its cue row brings it back.

    A topic begins with one of sixteen cue rows; its rows scatter around a centre that is drawn for
    each first visit. The return begins with the same cue. Queries are the first rows after a cue.
    """
    random = generator(0, "returning topic")
    vector_SLD, cue_KD = _filler(random, sequences, rows), _tags(random, 16)
    answer_SLD = np.zeros_like(vector_SLD)
    reach_SL = np.zeros((sequences, rows), dtype=np.int64)
    for sequence in range(sequences):
        centre_KD = np.zeros((16, DIM))
        last_K = np.full(16, -1)
        for row in range(0, rows - 10, 10):
            visited = [k for k in range(16) if last_K[k] >= 0 and row - last_K[k] >= 500]
            fresh = [k for k in range(16) if last_K[k] < 0]
            if visited and random.random() < 0.5:
                cue = int(random.choice(visited))
                answer_SLD[sequence, row + 1] = centre_KD[cue]
                reach_SL[sequence, row + 1] = row - last_K[cue]
                last_K[cue] = -1
            elif fresh:
                cue = int(random.choice(fresh))
                centre_KD[cue] = _unit(random.standard_normal(DIM))
                last_K[cue] = row
            else:
                continue
            vector_SLD[sequence, row] = _noisy(cue_KD[cue], NOISE, random)
            around_LD = np.repeat(centre_KD[cue : cue + 1], 9, axis=0)
            vector_SLD[sequence, row + 1 : row + 10] = _noisy(around_LD, 0.9, random)
            vector_SLD[sequence, row + 1] = _noisy(centre_KD[cue], NOISE, random)
    return _drawn(vector_SLD, answer_SLD, reach_SL, 40)


def nothing(*, sequences: int = 32, rows: int = 2000) -> Drawn:
    """Independent rows: the control, on which nothing beats chance."""
    vector_SLD = _filler(generator(0, "nothing"), sequences, rows)
    empty_SL = np.zeros(vector_SLD.shape[:2], dtype=np.int64)
    return _drawn(vector_SLD, np.zeros_like(vector_SLD), empty_SL, 40)


BANKS: dict[str, Callable[[], Drawn]] = {
    "regimes-2": lambda: regimes(2),
    "regimes-8": lambda: regimes(8),
    "regimes-8-quiet": lambda: regimes(8, 0.5),
    "regimes-32": lambda: regimes(32),
    "key": announced_key,
    **{f"echo-{d}": (lambda d=d: echo(d)) for d in (5, 20, 150, 300, 900, 1800)},
    "topic": returning_topic,
    "nothing": nothing,
}


def _filler(random: np.random.Generator, sequences: int, rows: int) -> Array:
    """Return independent unit rows without the first feature, which marks tags."""
    vector_SLD = random.standard_normal((sequences, rows, DIM))
    vector_SLD[..., :2] = 0
    return _unit(vector_SLD)


def _tags(random: np.random.Generator, count: int) -> Array:
    tag_KD = random.standard_normal((count, DIM))
    tag_KD[:, :2] = 0
    tag_KD = 0.8 * _unit(tag_KD)
    tag_KD[:, 0] = 0.6
    return tag_KD


def _rotation(random: np.random.Generator, dim: int) -> Array:
    orthogonal_DD, _ = np.linalg.qr(random.standard_normal((dim, dim)))
    return orthogonal_DD


def _noisy(vector_XD: Array, noise: float, random: np.random.Generator) -> Array:
    dim = vector_XD.shape[-1]
    return _unit(vector_XD + noise / dim**0.5 * random.standard_normal(vector_XD.shape))


def _unit(vector_XD: Array) -> Array:
    return vector_XD / np.linalg.norm(vector_XD, axis=-1, keepdims=True)


def _drawn(
    vector_SLD: Array, answer_SLD: Array, reach_SL: NDArray[np.int64], document_rows: int
) -> Drawn:
    """Join sequences of equal length, each cut into documents of `document_rows`."""
    sequences, rows, dim = vector_SLD.shape
    row_N = np.arange(sequences * rows)
    return Drawn(
        vector_SLD.reshape(-1, dim),
        answer_SLD.reshape(-1, dim),
        reach_SL.reshape(-1),
        row_N // rows,
        row_N // document_rows,
    )


@click.command()
@click.argument("name", type=click.Choice(list(BANKS)))
@click.argument("folder")
@click.option("--asked", help="Write the test rows that have a known answer, a query log.")
@click.option("--ctx", default=500, show_default=True, help="Of the windows of the query log.")
def main(name: str, folder: str, asked: str | None, ctx: int) -> None:
    """Write the drawn bank NAME to FOLDER."""
    drawn = BANKS[name]()
    bank = drawn.write(folder)
    if asked:
        test_Q = plan_windows(bank, ctx).queries["test"].target_row_Q
        row_Q = test_Q[drawn.reach_N[test_Q] > 0]
        sequence_Q = [f"sequence-{code}" for code in drawn.sequence_N[row_Q]]
        pd.DataFrame({"target_row": row_Q, "sequence": sequence_Q}).to_parquet(asked, index=False)
        print(f"{asked}: {len(row_Q):,} of {len(test_Q):,} test rows")
    print(f"{folder}: {bank.num_rows:,} rows of {bank.dim} dims, {len(bank.sequences)} sequences")


if __name__ == "__main__":
    main()
