"""A large drawn bank with the structure of text: `python -m benchmarks.text_bank <folder>`.

Sequences have a subject, documents a topic within it, rows drift around the topic; some rows are
set phrases, which come again all over the bank (twins). Directions have unequal variance, as those
of text encoders. The rows are drawn and written block by block, so that memory does not grow.
Shapes: N rows, D vector dim, L latent dims, B rows of a block.
"""

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pandas as pd

from lvm.bank.bank import Bank, write_bank

SEQUENCE_ROWS, DOCUMENT_ROWS = 16_000, 100
LATENT, PHRASES, PHRASE_SHARE = 96, 2000, 0.1
DRIFT, NOISE = 0.6, 0.5
LANES = ("Science", "History", "Law", "Medicine")


def draw(folder: Path, num_rows: int, dim: int, seed: int = 0) -> Bank:
    """Write the bank; one seed gives one bank."""
    row_N = np.arange(num_rows)
    sequence_N = row_N // SEQUENCE_ROWS
    rows = pd.DataFrame(
        {
            "sequence": pd.Series(sequence_N).map(lambda number: f"book {number:03d}"),
            "document": (row_N // DOCUMENT_ROWS).astype(str),
            "lane": np.array(LANES)[sequence_N % len(LANES)],
        }
    )
    blocks = vectors(num_rows, dim, np.random.default_rng(seed))
    return write_bank(folder, blocks, rows, "drawn", f"benchmarks/text_bank.py; seed={seed}")


def vectors(num_rows: int, dim: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the rows of one document after the other, (B, D) float32."""
    scale_L = (1 + np.arange(LATENT)) ** -0.5
    map_LD = random.standard_normal((LATENT, dim)) / LATENT**0.5
    phrase_KD = random.standard_normal((PHRASES, LATENT)) * scale_L @ map_LD
    subject_L = np.zeros(LATENT)
    for start in range(0, num_rows, DOCUMENT_ROWS):
        if start % SEQUENCE_ROWS == 0:
            subject_L = random.standard_normal(LATENT) * scale_L
        count = min(DOCUMENT_ROWS, num_rows - start)
        topic_L = subject_L + random.standard_normal(LATENT) * scale_L
        step_BL = random.standard_normal((count, LATENT)) * scale_L
        for row in range(1, count):
            step_BL[row] = DRIFT * step_BL[row - 1] + (1 - DRIFT**2) ** 0.5 * step_BL[row]
        noise_BD = NOISE * random.standard_normal((count, dim)) / LATENT**0.5
        row_BD = (topic_L + step_BL) @ map_LD + noise_BD
        is_phrase_B = random.random(count) < PHRASE_SHARE
        rank_B = PHRASES * random.random(is_phrase_B.sum()) ** 3  # some are much more common
        row_BD[is_phrase_B] = phrase_KD[rank_B.astype(int)]
        yield row_BD.astype(np.float32)


@click.command(help=__doc__)
@click.argument("folder", type=Path)
@click.option("--rows", default=637_997, show_default=True)
@click.option("--dim", default=768, show_default=True)
def main(folder: Path, rows: int, dim: int) -> None:
    bank = draw(folder, rows, dim)
    print(f"{folder}: {bank.num_rows:,} rows of {bank.dim} dims, {len(bank.sequences)} sequences")


if __name__ == "__main__":
    main()
