"""Count the candidates that score better than a query's truth, or tie with it.

Matrix products sort the candidates of a query into better, worse and undecided; undecided ones are
scored again in float64. The products are float32, or bf16 where this processor multiplies bf16
faster. Their error has a proven bound (see `Count`), so the counts are the same with either
product, any block size and any number of threads.

Shapes: Q queries, N bank rows, K candidates (one bank row per duplicate group), D vector dim, E the
columns of a bf16 product; q queries and b candidates of one tile, P pairs of these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from lvm.bank.bank import Bank, FloatArray
from lvm.windows.planning import ContextQueries, IntArray, Queries

SCORE_TIE = 1e-6  # scores closer than this are ties
AUTO, FP32, BF16 = "auto", "fp32", "bf16"
# A score tile of 2 MB stays in the cache of its core, so that counting costs a few per cent of the
# matrix product.
QUERY_BLOCK = 256
BANK_BLOCK = 2048
TILES = {"cpu": (QUERY_BLOCK, BANK_BLOCK), "cuda": (4096, 32_768)}  # queries, candidates
WORD, PACKED = 8, 1024  # marks in a word; marks whose words are added up before their bytes are
SAMPLE = 2048  # candidates used to choose the queries for bf16
# Queries with a larger share of undecided candidates are counted in float32: a pair in float64
# takes as long as a thousand in bf16 (384 dims, one core with avx512_bf16).
MAX_DOUBT = 0.0005
MIN_CLEAR = 0.5  # with a smaller share of queries for bf16 two passes cost more than one
PAIRS = 4096  # scored in float64 at a time: 50 MB at 768 dims
DENSE = 8  # a tile with more than one undecided pair in 8 is multiplied whole in float64
BF16_UNIT = 2.0**-8  # largest relative error of a number rounded to bf16
SLACK = 2.0**-20  # room for the float32 roundings outside the sum of products
CPU = torch.device("cpu")
OFFSETS = 3  # bf16 columns that hold the truth's cosine


@dataclass(frozen=True)
class Competition:
    """Queries with their candidates: the first row of each duplicate group.

    A group that lies wholly inside a query's context is not a candidate for it.
    """

    first_row_Q: IntArray
    target_row_Q: IntArray
    own_column_Q: IntArray  # the candidate that is the query's truth
    row_K: IntArray  # first row of each group, ascending
    last_row_K: IntArray
    covered_QK: sparse.csr_matrix | None  # for contexts that are not runs of rows

    @classmethod
    def of(cls, bank: Bank, queries: Queries, representative_N: IntArray) -> "Competition":
        row_N = np.arange(bank.num_rows)
        row_K = np.flatnonzero(representative_N == row_N)
        last_row_N = np.zeros(bank.num_rows, np.int64)
        last_row_N[representative_N] = row_N  # ascending: the last assignment remains
        own_column_Q = np.searchsorted(row_K, representative_N[queries.target_row_Q])
        covered_QK = None
        if isinstance(queries, ContextQueries):
            covered_QK = queries.covered_groups(representative_N, row_K)
        first_row_Q, target_row_Q = queries.first_row_Q, queries.target_row_Q
        return cls(first_row_Q, target_row_Q, own_column_Q, row_K, last_row_N[row_K], covered_QK)

    def take(self, places: IntArray) -> "Competition":
        """Return the queries at these positions, with the same candidates."""
        return replace(
            self,
            first_row_Q=self.first_row_Q[places],
            target_row_Q=self.target_row_Q[places],
            own_column_Q=self.own_column_Q[places],
            covered_QK=None if self.covered_QK is None else self.covered_QK[places],
        )

    def hidden(self, lines: slice, columns: slice) -> Tensor | None:
        """Return a mask (q, b) of the groups wholly inside a query's context; None if none are.

        The queries must be ordered by target.
        """
        if self.covered_QK is not None:
            covered = self.covered_QK[lines, columns]
            return torch.from_numpy(covered.toarray() > 0) if covered.nnz else None
        first_Q, target_Q = self.first_row_Q[lines], self.target_row_Q[lines]
        row_K, last_row_K = self.row_K[columns], self.last_row_K[columns]
        if row_K[-1] < first_Q.min() or row_K[0] >= target_Q[-1]:
            return None
        inside = (row_K >= first_Q[:, None]) & (last_row_K < target_Q[:, None])
        return torch.from_numpy(inside) if inside.any() else None


@dataclass(frozen=True)
class Block:
    """One block of candidates: unit vectors (b, D), and rounded ones (b, E) for bf16 products.

    `residual` is the largest length of the difference between the two. `unit_bD` is in memory, for
    decisions; `factor_bD` and `rounded_bE` are on the device that multiplies.
    """

    columns: slice
    unit_bD: Tensor
    factor_bD: Tensor
    rounded_bE: Tensor | None = None
    residual: float = 0.0

    @classmethod
    def of(
        cls, unit_bD: FloatArray, columns: slice, needs_bf16: bool, device: torch.device = CPU
    ) -> "Block":
        unit = torch.from_numpy(unit_bD)
        factor = unit.to(device)
        if not needs_bf16:
            return cls(columns, unit, factor)
        rounded = factor.bfloat16()
        ones = torch.ones(len(unit), OFFSETS, dtype=torch.bfloat16, device=device)
        residual = float((factor - rounded).norm(dim=1).max())
        return cls(columns, unit, factor, torch.cat([rounded, ones], dim=1), residual)


@dataclass(frozen=True)
class Job:
    """Queries of one predictor that are counted by one kind of product, ordered by target.

    `place_Q` are their positions among all queries in that order, `cosine_Q` the cosines of the
    predictions with their truths. For bf16 products `rounded_QE` holds the rounded predictions
    followed by -cosine as a sum of OFFSETS bf16 numbers, and `residual_Q` the lengths of the
    rounding differences; both are None for float32.
    """

    place_Q: IntArray
    competition: Competition
    unit_QD: Tensor
    cosine_Q: NDArray[np.float64]
    corrections: list[FloatArray | None]
    rounded_QE: Tensor | None = None
    residual_Q: NDArray[np.float64] | None = None
    factor_QD: Tensor | None = None  # on the device that multiplies

    @classmethod
    def of(
        cls,
        unit_QD: Tensor,
        competition: Competition,
        bank: Bank,
        corrections: list[FloatArray | None],
    ) -> "Job":
        truth_row_Q = competition.row_K[competition.own_column_Q]
        cosine_Q = np.empty(len(truth_row_Q))
        for start in range(0, len(truth_row_Q), BANK_BLOCK):
            lines = slice(start, start + BANK_BLOCK)
            truth_QD, own_QD = bank.unit(truth_row_Q[lines]), unit_QD[lines].numpy()
            cosine_Q[lines] = np.einsum("qd,qd->q", own_QD, truth_QD, dtype=np.float64)
        return cls(np.arange(len(unit_QD)), competition, unit_QD, cosine_Q, corrections)

    def rounded(self) -> "Job":
        """Return the same queries, prepared for bf16 products."""
        rounded_QD = self.unit_QD.bfloat16()
        offsets, rest_Q = [], torch.from_numpy(-self.cosine_Q)
        for _ in range(OFFSETS):
            offsets.append(rest_Q.bfloat16())
            rest_Q = rest_Q - offsets[-1].double()
        residual_Q = (self.unit_QD - rounded_QD).norm(dim=1).double().numpy()
        rounded_QE = torch.cat([rounded_QD, torch.stack(offsets, dim=1)], dim=1)
        return replace(self, rounded_QE=rounded_QE, residual_Q=residual_Q)

    def on(self, device: torch.device) -> "Job":
        """Return the same queries with the factors of their products on a device."""
        if self.rounded_QE is not None:
            return replace(self, rounded_QE=self.rounded_QE.to(device))
        return replace(self, factor_QD=self.unit_QD.to(device))

    def take(self, places: IntArray) -> "Job":
        """Return the queries at these positions."""
        return replace(
            self,
            place_Q=self.place_Q[places],
            competition=self.competition.take(places),
            unit_QD=self.unit_QD[torch.from_numpy(places)],
            cosine_Q=self.cosine_Q[places],
            rounded_QE=None if self.rounded_QE is None else self.rounded_QE[places],
            residual_Q=None if self.residual_Q is None else self.residual_Q[places],
        )

    def count(self, block: Block, counts: Sequence["Count"], tile: Tensor) -> None:
        """Add one block of candidates to the counts under each correction, tile by tile."""
        num_queries = tile.shape[1] // len(block.unit_bD)
        for start in range(0, len(self.unit_QD), num_queries):
            lines = slice(start, min(start + num_queries, len(self.unit_QD)))
            shape = (lines.stop - lines.start, len(block.unit_bD))
            product_qb, scratch_qb = tile[:, : shape[0] * shape[1]].view(2, *shape)
            if self.rounded_QE is None:
                assert self.factor_QD is not None
                torch.matmul(self.factor_QD[lines], block.factor_bD.T, out=product_qb)
            else:
                assert block.rounded_bE is not None
                product_qb.copy_(self.rounded_QE[lines] @ block.rounded_bE.T)
            hidden_qb = self.competition.hidden(lines, block.columns)
            if hidden_qb is not None:
                hidden_qb = hidden_qb.to(tile.device)
            for one in counts:
                score_qb = one.scores(product_qb, block.columns, scratch_qb)
                one.add(lines, block, score_qb, hidden_qb)


def split_by_doubt(job: Job, bank: Bank) -> list[Job]:
    """Assign queries with few undecided candidates to bf16, the others to float32.

    The share of undecided candidates is measured on SAMPLE candidates. Row corrections with a scale
    other than 1 are always counted in float32.
    """
    if any(pair_N2 is not None and (pair_N2[:, 0] != 1).any() for pair_N2 in job.corrections):
        return [job]
    column_S = np.linspace(0, len(job.competition.row_K) - 1, SAMPLE).astype(np.int64)
    row_S = job.competition.row_K[column_S]
    block = Block.of(bank.unit(row_S), slice(0, SAMPLE), needs_bf16=True)
    both = job.rounded()
    share_Q = np.zeros(len(job.cosine_Q))
    for count in [Count(both, pair_N2) for pair_N2 in job.corrections]:
        for start in range(0, len(share_Q), QUERY_BLOCK):
            lines = slice(start, start + QUERY_BLOCK)
            score_QS = job.unit_QD[lines] @ block.unit_bD.T
            if count.pair_2K is not None:
                score_QS += count.pair_2K[1, column_S]
            away_QS = score_QS - _column(count.truth_Q[lines])
            in_doubt_QS = away_QS.abs() <= _column(count.zone(lines, block))
            share_Q[lines] = np.maximum(share_Q[lines], in_doubt_QS.float().mean(dim=1).numpy())
    is_clear_Q = share_Q <= MAX_DOUBT
    if is_clear_Q.mean() < MIN_CLEAR:
        return [job]
    parts = [(both, np.flatnonzero(is_clear_Q)), (job, np.flatnonzero(~is_clear_Q))]
    return [one.take(places) for one, places in parts if len(places)]


@dataclass
class Tally:
    """Counts of candidates of Q queries, and the best candidate of each.

    `num_all_Q2` holds the better and the tied candidates, `num_hidden_Q2` those of them that the
    context hides. `best_column_Q` is the best candidate that is not hidden, better than the truth
    by `best_lead_Q`; -1 if there is none.
    """

    num_all_Q2: NDArray[np.float64]
    num_hidden_Q2: NDArray[np.float64]
    best_lead_Q: NDArray[np.float64]
    best_column_Q: IntArray

    @classmethod
    def empty(cls, num_queries: int) -> "Tally":
        """Return the tally of no candidates."""
        num_all_Q2, num_hidden_Q2 = np.zeros((2, num_queries, 2))
        best_lead_Q, best_column_Q = np.full(num_queries, SCORE_TIE), np.full(num_queries, -1)
        return cls(num_all_Q2, num_hidden_Q2, best_lead_Q, best_column_Q)

    def merge(self, other: "Tally") -> None:
        """Add the tally of other candidates; of equally good best ones the first is kept."""
        self.num_all_Q2 += other.num_all_Q2
        self.num_hidden_Q2 += other.num_hidden_Q2
        is_equal_Q = other.best_lead_Q == self.best_lead_Q
        is_first_Q = is_equal_Q & (other.best_column_Q < self.best_column_Q)
        wins_Q = (other.best_lead_Q > self.best_lead_Q) | is_first_Q
        self.best_lead_Q[wins_Q] = other.best_lead_Q[wins_Q]
        self.best_column_Q[wins_Q] = other.best_column_Q[wins_Q]


class Count:
    """Counts of better and tied candidates of one job under one row correction.

    The score of a tile is away from the truth's by `score - centre_Q`, up to an error that `zone`
    bounds. Candidates beyond the zone are counted as they stand, those within it in float64.

    Proof of the bound. Let q, y be a prediction and a candidate (unit vectors, float32), c = q.y,
    and g = n u / (1 - n u) with u = 2^-24 the bound on a float32 sum of n products in any order
    (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).

    *float32*: |product - c| <= g sum |q_i y_i| <= g, by Cauchy-Schwarz, n = D. The row correction
    multiplies it by its scale.

    *bf16*: let p, x be q, y rounded to bf16. Then |q.y - p.x| = |(q - p).y + p.(y - x)| <= |q - p|
    + (1 + |q - p|) |y - x|, and both lengths are measured. Products of two bf16 numbers are exact
    in float32. The product sums n = D + OFFSETS of them: p.x, and -t for the cosine t of the truth.
    The sum v differs from c - t by at most e = |q - p| + (1 + |q - p|) |y - x| + 3 g.
    The matrix holds o = v (1 + d) with |d| <= b = 2^-8, for its numbers are bf16. With the
    difference s of the biases, the true distance is a = c - t + s, the counted one o + s. From
    a <= h follows v <= h - s + e, hence o + s <= h + e + b (h + e + |s|); the other side is
    symmetric. So |o + s| > (h + e)(1 + b) + b |s| decides on which side of the tie h the candidate
    is. A small v has a small error, which is why the truth's cosine is subtracted in the product.

    SLACK covers the roundings to float32 of scores, limits and lengths.
    """

    def __init__(self, job: Job, pair_N2: FloatArray | None) -> None:
        self.job = job
        own_column_Q, num = job.competition.own_column_Q, len(job.cosine_Q)
        self.pair_2K: Tensor | None = None
        self.truth_Q = job.cosine_Q
        largest_scale, largest_bias = 1.0, 0.0
        spread_Q = own_bias_Q = np.zeros(num)
        if pair_N2 is not None:
            pair_K2 = pair_N2[job.competition.row_K]
            self.pair_2K = torch.from_numpy(pair_K2.T.copy())
            own_scale_Q, own_bias_Q = pair_K2[own_column_Q].astype(np.float64).T
            self.truth_Q = own_scale_Q * job.cosine_Q + own_bias_Q
            low, high = pair_K2[:, 1].min(), pair_K2[:, 1].max()
            largest_scale, largest_bias = np.abs(pair_K2).max(axis=0).tolist()
            spread_Q = np.maximum(high - own_bias_Q, own_bias_Q - low)
        num_terms = job.unit_QD.shape[1] + OFFSETS
        sum_error = num_terms * 2.0**-24 / (1 - num_terms * 2.0**-24)
        if job.residual_Q is None:
            self.centre_Q, self.relative = self.truth_Q, 0.0
            size_Q = largest_scale + largest_bias + np.abs(self.truth_Q)
            self.zone_Q = SCORE_TIE + largest_scale * sum_error + SLACK * size_Q
            self.zone_by_residual_Q = np.zeros(num)
        else:
            self.centre_Q, self.relative = own_bias_Q, BF16_UNIT
            error_Q = SCORE_TIE + job.residual_Q + 3 * sum_error
            self.zone_Q = error_Q * (1 + BF16_UNIT) + BF16_UNIT * spread_Q
            self.zone_Q = self.zone_Q + SLACK * (1 + largest_bias + spread_Q)
            self.zone_by_residual_Q = (1 + job.residual_Q) * (1 + BF16_UNIT)
        self.tally = Tally.empty(num)

    def zone(self, lines: slice, block: Block) -> NDArray[np.float64]:
        """Return the distance to the truth's score within which a candidate is undecided, (q,)."""
        return self.zone_Q[lines] + self.zone_by_residual_Q[lines] * block.residual

    def scores(self, product_qb: Tensor, columns: slice, out: Tensor) -> Tensor:
        """Return the corrected scores of a tile of products."""
        if self.pair_2K is None:
            return product_qb
        scale_b, bias_b = self.pair_2K[:, columns].to(product_qb.device)
        return torch.addcmul(bias_b, product_qb, scale_b, out=out)

    def add(self, lines: slice, block: Block, score_qb: Tensor, hidden_qb: Tensor | None) -> None:
        """Count one tile. Where few queries have a candidate near the truth, only these cost."""
        device = score_qb.device
        centre_q1 = _column(self.centre_Q[lines]).to(device)
        zone_q1 = _column(self.zone(lines, block)).to(device)
        line_q = np.arange(lines.start, lines.stop)
        peak_q1 = score_qb.amax(dim=1, keepdim=True)
        chosen = torch.nonzero(peak_q1[:, 0] >= (centre_q1 - zone_q1)[:, 0])[:, 0]
        if not len(chosen):
            return
        if 2 * len(chosen) < len(score_qb):
            score_qb, peak_q1 = score_qb[chosen], peak_q1[chosen]
            centre_q1, zone_q1 = centre_q1[chosen], zone_q1[chosen]
            hidden_qb = None if hidden_qb is None else hidden_qb[chosen]
            line_q = line_q[chosen.cpu().numpy()]
        above_qb = _compared(score_qb, centre_q1 + zone_q1, np.greater, torch.gt)
        self.tally.num_all_Q2[line_q, 0] += _row_counts(above_qb)
        if hidden_qb is not None:
            num_hidden_q = (above_qb & hidden_qb).sum(dim=1)
            self.tally.num_hidden_Q2[line_q, 0] += num_hidden_q.cpu().numpy()
        is_doubtful_qb = _compared(score_qb, centre_q1 - zone_q1, np.greater_equal, torch.ge)
        is_doubtful_qb ^= above_qb
        place_P, column_P = _marked(is_doubtful_qb)
        self._decide(line_q, place_P, column_P, block, hidden_qb)
        self._keep_best(line_q, block, score_qb, centre_q1, zone_q1, peak_q1, hidden_qb)

    def _decide(
        self,
        line_q: IntArray,
        place_P: IntArray,
        column_P: IntArray,
        block: Block,
        hidden_qb: Tensor | None,
    ) -> None:
        """Count undecided candidates by their float64 scores; the truth is not among them."""
        first = block.columns.start
        is_other_P = self.job.competition.own_column_Q[line_q[place_P]] != first + column_P
        place_P, column_P = place_P[is_other_P], column_P[is_other_P]
        lead_P = self._leads(line_q[place_P], column_P, block)
        for kind, is_counted_P in enumerate((lead_P > SCORE_TIE, np.abs(lead_P) <= SCORE_TIE)):
            counted = place_P[is_counted_P]
            self.tally.num_all_Q2[line_q, kind] += np.bincount(counted, minlength=len(line_q))
            if hidden_qb is not None:
                counted_column = torch.from_numpy(column_P[is_counted_P]).to(hidden_qb.device)
                place = torch.from_numpy(counted).to(hidden_qb.device)
                hidden = hidden_qb[place, counted_column].cpu().numpy()
                num_hidden_q = np.bincount(counted[hidden], minlength=len(line_q))
                self.tally.num_hidden_Q2[line_q, kind] += num_hidden_q

    def _keep_best(
        self,
        line_q: IntArray,
        block: Block,
        score_qb: Tensor,
        centre_q1: Tensor,
        zone_q1: Tensor,
        peak_q1: Tensor,
        hidden_qb: Tensor | None,
    ) -> None:
        """Update the best candidate of the queries whose best one may be in this tile.

        A true lead l is counted as at least l (1 - b) - zone and at most l (1 + b) + zone, where b
        is the relative error of the product.
        """
        if hidden_qb is not None:
            score_qb = score_qb.masked_fill(hidden_qb, -torch.inf)
            peak_q1 = score_qb.amax(dim=1, keepdim=True)
        best_q1 = _column(self.tally.best_lead_Q[line_q]).to(score_qb.device)
        best_q1 = best_q1 * (1 - self.relative) - zone_q1
        some = torch.nonzero((peak_q1 - centre_q1)[:, 0] > best_q1[:, 0])[:, 0]
        if not len(some):
            return
        lead_qb, peak_q1 = score_qb[some] - centre_q1[some], (peak_q1 - centre_q1)[some]
        peak_q1 = peak_q1 * (1 - 2 * self.relative) - 2 * zone_q1[some]
        at_least_q1 = torch.maximum(best_q1[some], peak_q1)
        place, column = torch.nonzero(lead_qb >= at_least_q1, as_tuple=True)
        line_P, column_P = line_q[some[place].cpu().numpy()], column.cpu().numpy()
        lead_P = self._leads(line_P, column_P, block)
        column_P = block.columns.start + column_P
        order_P = np.lexsort((column_P, -lead_P, line_P))
        line_P, first = np.unique(line_P[order_P], return_index=True)
        lead_P, column_P = lead_P[order_P][first], column_P[order_P][first]
        is_better_P = lead_P > self.tally.best_lead_Q[line_P]
        self.tally.best_lead_Q[line_P[is_better_P]] = lead_P[is_better_P]
        self.tally.best_column_Q[line_P[is_better_P]] = column_P[is_better_P]

    def _leads(self, line_P: IntArray, column_P: IntArray, block: Block) -> NDArray[np.float64]:
        """Return the float64 scores of pairs minus the scores of the truths, (P,)."""
        score_P = np.empty(len(line_P))
        lines, place_P = np.unique(line_P, return_inverse=True)
        if len(line_P) * DENSE > len(lines) * len(block.unit_bD):
            whole_qb = self.job.unit_QD[lines].double() @ block.unit_bD.double().T
            score_P = whole_qb.numpy()[place_P, column_P]
        else:
            unit_QD, unit_bD = self.job.unit_QD.numpy(), block.unit_bD.numpy()
            for start in range(0, len(line_P), PAIRS):
                part = slice(start, start + PAIRS)
                pair = unit_QD[line_P[part]], unit_bD[column_P[part]]
                score_P[part] = np.einsum("pd,pd->p", *pair, dtype=np.float64)
        if self.pair_2K is not None:
            scale_P, bias_P = self.pair_2K[:, block.columns][:, column_P].double().numpy()
            score_P = scale_P * score_P + bias_P
        return score_P - self.truth_Q[line_P]


def _compared(
    score_qb: Tensor, limit_q1: Tensor, on_cpu: np.ufunc, elsewhere: Callable[..., Tensor]
) -> Tensor:
    """Return a mask (q, b); numpy's comparisons take a third of the time of torch's on the CPU."""
    if score_qb.device == CPU:
        return torch.from_numpy(on_cpu(score_qb.numpy(), limit_q1.numpy()))
    return elsewhere(score_qb, limit_q1)


def _row_counts(mask_qb: Tensor) -> IntArray:
    """Return how many of each row are marked, (q,)."""
    num, width = mask_qb.shape
    if width % PACKED:
        return mask_qb.sum(dim=1).cpu().numpy()
    # Eight marks are added at once: no byte of a sum of 128 words exceeds 128.
    words = mask_qb.view(torch.int64).view(num, -1, PACKED // WORD)
    return words.sum(dim=2).view(torch.uint8).sum(dim=1).cpu().numpy()


def _marked(mask_qb: Tensor) -> tuple[IntArray, IntArray]:
    """Return the places and columns of the marks; few are expected."""
    num, width = mask_qb.shape
    if width % WORD or mask_qb.device != CPU:
        place_P, column_P = torch.nonzero(mask_qb).T.cpu().numpy()
        return place_P, column_P
    word_W = np.flatnonzero(mask_qb.numpy().view(np.int64))
    number_P, byte_P = np.nonzero(mask_qb.numpy().reshape(-1, WORD)[word_W])
    flat_P = WORD * word_W[number_P] + byte_P
    return flat_P // width, flat_P % width


def _column(value_q: NDArray[np.float64]) -> Tensor:
    """Return values as a float32 column (q, 1)."""
    return torch.from_numpy(value_q.astype(np.float32))[:, None]
