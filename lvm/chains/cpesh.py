"""CPESH records: concept, probe, expected row of a chain, soft negatives, hard negatives.

Shapes: C chains, M distinct rows of all chains, Q expected rows of one block, D vector dim,
E adjacent pairs of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from lvm.bank.bank import FloatArray
from lvm.bank.row_table import Integers
from lvm.chains.walks import Chain, Pool, flat_rows
from lvm.system.progress import steps
from lvm.system.seeding import generator
from lvm.system.settings import ChainRules

BLOCK_QUERIES = 512
SAMPLE_COLUMNS = 256
PAIRS = 100_000
ABSOLUTE, PERCENTILES = "absolute", "percentiles"


@dataclass(frozen=True)
class Bands:
    """Cosines to the expected row: soft in [soft_low, soft_high), hard below hard_high."""

    rule: str
    soft_low: float
    soft_high: float
    hard_high: float


@dataclass(frozen=True)
class Mined:
    """CPESH records, and the share of chains that have one (`rate`).

    `absolute_rate` is the share that the absolute bands reach, also if other bands were used.
    """

    records: pd.DataFrame
    bands: Bands
    rate: float
    absolute_rate: float


def mine(
    chains: Sequence[Chain], pool: Pool, adjacent_E: FloatArray, rules: ChainRules, seed: int
) -> Mined:
    """Return one record per chain; row numbers count the rows of all chains, concatenated.

    If the absolute bands reach fewer than `min_attach` of the chains, percentiles of this encoder's
    cosines replace them. Raises ValueError if these reach fewer, too.
    """
    miner = _Miner(chains, pool, rules, seed)
    bands = Bands(ABSOLUTE, rules.soft_low, rules.soft_high, rules.hard_high)
    records = miner.records(bands)
    rate = absolute_rate = len(records) / len(chains)
    if rate < rules.min_attach:
        bands = _own_bands(miner, adjacent_E, rules, seed)
        records = miner.records(bands)
        rate = len(records) / len(chains)
    if rate < rules.min_attach:
        raise ValueError(
            f"CPESH: {rate:.1%} of {len(chains):,} chains have soft and hard negatives (with the "
            f"absolute cosines {absolute_rate:.1%}); {rules.min_attach:.0%} must, so give more or "
            "more varied chains"
        )
    return Mined(pd.DataFrame(records), bands, rate, absolute_rate)


class _Miner:
    """The distinct rows of the chains, among which negatives are searched."""

    def __init__(self, chains: Sequence[Chain], pool: Pool, rules: ChainRules, seed: int) -> None:
        self.chains, self.pool, self.rules, self.seed = chains, pool, rules, seed
        rows, self.start_C = flat_rows(chains)
        self.row_M, self.place_M, at_E = np.unique(rows, return_index=True, return_inverse=True)
        self.at_E = at_E
        self.unit_MD = pool.unit(self.row_M)

    def records(self, bands: Bands) -> list[dict[str, Any]]:
        """Expect the last row of each chain; without negatives, the one before, and so on."""
        found: dict[int, dict[str, Any]] = {}
        for back in range(1, self.rules.cpesh_steps + 1):
            pending = [c for c in range(len(self.chains)) if c not in found]
            pending = [c for c in pending if len(self.chains[c].rows) - back >= 1]
            blocks = range(0, len(pending), BLOCK_QUERIES)
            for start in steps(blocks, f"CPESH {back}, {bands.rule}", "blocks"):
                block = pending[start : start + BLOCK_QUERIES]
                for chain, record in self._block(block, back, bands, start):
                    found[chain] = record
        return [found[chain] for chain in sorted(found)]

    def _block(
        self, block: list[int], back: int, bands: Bands, number: int
    ) -> list[tuple[int, dict[str, Any]]]:
        """Return the records of a block of chains; the expected row is `back` from the end."""
        length_Q = np.array([len(self.chains[chain].rows) for chain in block])
        expected_Q = self.start_C[block] + length_Q - back
        score_QM = self.unit_MD[self.at_E[expected_Q]] @ self.unit_MD.T
        for position, chain in enumerate(block):  # no row of the chain is a negative
            own = slice(self.start_C[chain], self.start_C[chain] + length_Q[position])
            score_QM[position, self.at_E[own]] = np.nan
        soft = _nearest_in_band(score_QM, bands, self.rules.negatives)
        random = generator(self.seed, f"hard negatives {back} {number}")
        column_S = random.permutation(len(self.row_M))[:SAMPLE_COLUMNS]
        hard = _first_below(score_QM[:, column_S], column_S, bands, self.rules.negatives)
        return [
            (chain, self._record(chain, expected, score_M, soft_m, hard_m, bands))
            for chain, expected, score_M, soft_m, hard_m in zip(
                block, expected_Q, score_QM, soft, hard, strict=True
            )
            if len(soft_m) and len(hard_m)
        ]

    def _record(
        self,
        chain: int,
        expected: int,
        score_M: FloatArray,
        soft_m: Integers,
        hard_m: Integers,
        bands: Bands,
    ) -> dict[str, Any]:
        concept, probe = int(self.start_C[chain]), int(expected) - 1
        target_D = self.unit_MD[self.at_E[expected]]
        record: dict[str, Any] = {"rule": bands.rule}
        for name, place in (("concept", concept), ("probe", probe), ("expected", int(expected))):
            record |= {name: self._text(self.at_E[place]), f"{name}_row": place}
        for name, place in (("concept", concept), ("probe", probe)):
            record[f"{name}_score"] = float(self.unit_MD[self.at_E[place]] @ target_D)
        for name, negative_m in (("soft", soft_m), ("hard", hard_m)):
            record |= {
                name: [self._text(one) for one in negative_m],
                f"{name}_rows": self.place_M[negative_m].tolist(),
                f"{name}_scores": score_M[negative_m].tolist(),
            }
        return record

    def _text(self, at: int) -> str | None:
        return None if self.pool.text_N is None else str(self.pool.text_N[self.row_M[at]])


def _nearest_in_band(score_QM: FloatArray, bands: Bands, count: int) -> list[Integers]:
    """Return the columns of the highest scores inside the soft band, highest first."""
    scores = torch.from_numpy(score_QM)
    outside = ~((scores >= bands.soft_low) & (scores < bands.soft_high))
    top = scores.masked_fill(outside, -2).topk(min(count, scores.shape[1]), dim=1)
    pairs = zip(top.indices.numpy(), top.values.numpy(), strict=True)
    return [column_k[score_k > -2] for column_k, score_k in pairs]


def _first_below(
    score_QS: FloatArray, column_S: Integers, bands: Bands, count: int
) -> list[Integers]:
    """Return the first sampled columns with a score below the hard bound."""
    return [column_S[np.flatnonzero(below_S)[:count]] for below_S in score_QS < bands.hard_high]


def _own_bands(miner: _Miner, adjacent_E: FloatArray, rules: ChainRules, seed: int) -> Bands:
    """Return bands of this encoder: percentiles of the cosines of adjacent and of random rows."""
    random = generator(seed, "random pairs")
    left_P, right_P = random.integers(0, len(miner.row_M), size=(2, PAIRS))
    pairs = left_P != right_P
    if not pairs.any():
        return Bands(PERCENTILES, 1.0, 1.0, -1.0)
    scores = [
        np.einsum("pd,pd->p", miner.unit_MD[left_P[part]], miner.unit_MD[right_P[part]])
        for part in np.array_split(np.flatnonzero(pairs), 16)
    ]
    low, high = np.percentile(adjacent_E, [rules.soft_low_percentile, rules.soft_high_percentile])
    hard = np.percentile(np.concatenate(scores), rules.hard_percentile)
    return Bands(PERCENTILES, float(low), float(high), float(min(hard, low)))
