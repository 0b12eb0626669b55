"""Gates: the conditions that a chain must meet, applied in a fixed order; each counts its drops.

Shapes: N concepts of the pool, C chains, E rows of all chains concatenated, D vector dim.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from lvm.bank.bank import Bank, FloatArray
from lvm.bank.row_table import Integers
from lvm.chains.walks import Candidates, Chain, Concepts, Pool, bank_pool, flat_rows
from lvm.corpus.encoders import Encoder
from lvm.corpus.ingest import encode_texts
from lvm.system.settings import ChainRules

BLOCK_ROWS = 16384
BLOCK_CHAINS = 1024
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Gate:
    """The name of a gate, how many chains it dropped, and why."""

    name: str
    dropped: int
    reason: str


@dataclass(frozen=True)
class CoherenceRule:
    """Least coherence: an absolute cosine, a percentile of the source's own chains, or both."""

    absolute: float | None
    percentile: float | None

    def threshold(self, coherence_C: FloatArray) -> float:
        """Return the least coherence that these chains must reach."""
        parts = [] if self.absolute is None else [self.absolute]
        if self.percentile is not None and len(coherence_C):
            parts.append(float(np.percentile(coherence_C, self.percentile)))
        return max(parts, default=-1.0)


def coherence_rule(text: str, rules: ChainRules) -> CoherenceRule:
    """Parse `auto`, a cosine such as 0.7, a percentile such as p40, or both: 0.5,p40."""
    if text == "auto":
        return CoherenceRule(None, rules.coherence_percentile)
    absolute = percentile = None
    for part in text.split(","):
        is_percentile = part.startswith("p")
        try:
            number = float(part[is_percentile:])
        except ValueError:
            number = float("nan")
        if not 0 <= number <= (100 if is_percentile else 1):
            raise ValueError(
                f"coherence {text!r}: must be auto, a cosine from 0 to 1, a percentile such as "
                "p40, or both: 0.5,p40"
            )
        if is_percentile:
            percentile = number
        else:
            absolute = number
    return CoherenceRule(absolute, percentile)


def kept(chains: Sequence[Chain], keep_C: BoolArray) -> list[Chain]:
    """Return the chains that a gate keeps."""
    return [chain for chain, keep in zip(chains, keep_C, strict=True) if keep]


def length_gate(chains: Sequence[Chain], rules: ChainRules) -> tuple[list[Chain], Gate]:
    """Keep chains of `min_length` to `max_length` concepts."""
    low, high = rules.min_length, rules.max_length
    keep_C = np.array([low <= len(chain.rows) <= high for chain in chains], dtype=bool)
    reason = f"fewer than {low} or more than {high} concepts"
    return kept(chains, keep_C), Gate("length", int((~keep_C).sum()), reason)


def lane_gate(chains: Sequence[Chain], lane_N: npt.NDArray[np.object_]) -> tuple[list[Chain], Gate]:
    """Keep chains whose rows share one lane ("" counts as a lane) and give them that lane.

    If a chain names a lane, its rows must have that lane, unless the whole pool has no lanes.
    """
    one_lane = []
    any_lane = bool((lane_N != "").any())
    for chain in chains:
        lanes = {lane_N[row] for row in chain.rows}
        if chain.lane is not None and not any_lane:
            lanes = {chain.lane}
        if len(lanes) == 1 and chain.lane in (None, *lanes):
            one_lane.append(chain._replace(lane=lanes.pop()))
    reason = "rows of more than one lane, or of another than asked for"
    return one_lane, Gate("lane", len(chains) - len(one_lane), reason)


def check_lanes(chains: Sequence[Chain], base: Bank) -> None:
    """Raise ValueError if a chain has a lane that the base does not have."""
    if base.lane_N is None:
        return
    unknown = sorted({str(chain.lane) for chain in chains} - {*base.lanes, ""})
    if unknown:
        shown = ", ".join(unknown[:4]) + (f" with {len(unknown) - 4} more" if unknown[4:] else "")
        raise ValueError(
            f"lanes: {shown} of the source is not a lane of base {base.path} "
            f"({', '.join(base.lanes)}); map subtrees to them, lanes=<root>=<lane>,..., or take a "
            "base with these lanes"
        )


def twin_gate(chains: Sequence[Chain], pool: Pool, rules: ChainRules) -> tuple[list[Chain], Gate]:
    """Keep chains without twins: no two rows have a cosine of `rules.twin` or more."""
    keep_C = np.ones(len(chains), dtype=bool)
    for start in range(0, len(chains), BLOCK_CHAINS):
        block = chains[start : start + BLOCK_CHAINS]
        length_C = np.array([len(chain.rows) for chain in block])
        row_CL = np.zeros((len(block), length_C.max()), dtype=np.int64)
        there_CL = np.arange(length_C.max()) < length_C[:, None]
        row_CL[there_CL] = flat_rows(block)[0]
        unit_CLD = pool.unit(row_CL)
        score_CLL = np.triu(unit_CLD @ unit_CLD.transpose(0, 2, 1), k=1)
        twin_CLL = (score_CLL >= rules.twin) & there_CL[:, None, :]
        keep_C[start : start + len(block)] = ~twin_CLL.any(axis=(1, 2))
    reason = f"two rows of a cosine of {rules.twin:g} or more"
    return kept(chains, keep_C), Gate("twins", int((~keep_C).sum()), reason)


def answer_gate(
    chains: Sequence[Chain], pool: Pool, answer_QD: FloatArray, rules: ChainRules
) -> tuple[list[Chain], Gate]:
    """Keep chains without a twin of a query's answer: training on it would leak the answer."""
    rows, start_C = flat_rows(chains)
    unique_U, at_E = np.unique(rows, return_inverse=True)
    leaks_U = np.zeros(len(unique_U), dtype=bool)
    for start in range(0, len(unique_U), BLOCK_CHAINS):
        block = slice(start, start + BLOCK_CHAINS)
        leaks_U[block] = (pool.unit(unique_U[block]) @ answer_QD.T).max(axis=1) >= rules.answer_twin
    keep_C = ~np.logical_or.reduceat(leaks_U[at_E], start_C) if len(chains) else np.ones(0, bool)
    reason = f"a row of a cosine of {rules.answer_twin:g} or more to a query's answer"
    return kept(chains, keep_C), Gate("answers", int((~keep_C).sum()), reason)


def base_gate(
    chains: Sequence[Chain], code_N: Integers, base_code_N: Integers
) -> tuple[list[Chain], Gate]:
    """Keep chains that are not consecutive rows of the base (codes as in `row_codes`)."""
    places: dict[int, list[int]] = defaultdict(list)
    wanted = {int(code_N[chain.rows[0]]) for chain in chains}
    for row in np.flatnonzero(np.isin(base_code_N, list(wanted))).tolist():
        places[int(base_code_N[row])].append(row)
    keep_C = np.ones(len(chains), dtype=bool)
    for number, chain in enumerate(chains):
        codes = code_N[list(chain.rows)]
        runs = (base_code_N[row : row + len(codes)] for row in places[int(codes[0])])
        keep_C[number] = not any(np.array_equal(codes, run) for run in runs)
    return kept(chains, keep_C), Gate("base", int((~keep_C).sum()), "a run of rows of the base")


def coherence(chains: Sequence[Chain], pool: Pool) -> tuple[FloatArray, FloatArray]:
    """Return the mean cosine of adjacent rows of each chain (C,), and all these cosines."""
    rows, start_C = flat_rows(chains)
    if not len(chains):
        return np.empty(0, np.float32), np.empty(0, np.float32)
    score_E = np.empty(len(rows) - 1, dtype=np.float32)
    for start in range(0, len(score_E), BLOCK_ROWS):
        unit_ED = pool.unit(rows[start : start + BLOCK_ROWS + 1])
        score_E[start : start + BLOCK_ROWS] = np.einsum("ed,ed->e", unit_ED[:-1], unit_ED[1:])
    inside_E = np.ones(len(score_E), dtype=bool)
    inside_E[start_C[1:] - 1] = False  # from the end of one chain to the start of the next
    summed_C = np.add.reduceat(np.append(np.where(inside_E, score_E, 0), 0.0), start_C)
    length_C = np.diff(start_C, append=len(rows))
    return (summed_C / (length_C - 1)).astype(np.float32), score_E[inside_E]


def coherence_gate(
    chains: Sequence[Chain], coherence_C: FloatArray, least: float
) -> tuple[list[Chain], Gate]:
    """Keep chains with a coherence of at least `least`."""
    keep_C = coherence_C >= least
    reason = f"a mean cosine of adjacent rows below {least:.3f}"
    return kept(chains, keep_C), Gate("coherence", int((~keep_C).sum()), reason)


def repeat_gate(
    chains: Sequence[Chain], code_N: Integers, rules: ChainRules
) -> tuple[list[Chain], Gate]:
    """Keep chains that share fewer than `repeated_share` of their rows with any earlier chain.

    A chain of n rows is dropped if an earlier chain holds `repeated` of them. Such a chain holds at
    least one of any n - repeated + 1 rows, so only chains that hold one of the rarest are compared.
    """
    holders: dict[int, list[int]] = defaultdict(list)
    fresh: list[Chain] = []
    fresh_codes: list[set[int]] = []
    for chain in chains:
        codes = set(code_N[list(chain.rows)].tolist())
        repeated = math.ceil(rules.repeated_share * len(codes))
        rarest = sorted(codes, key=lambda code: len(holders[code]))
        rarest = rarest[: max(0, len(codes) - repeated + 1)]
        near = {holder for code in rarest for holder in holders[code]}
        most = max((len(codes & fresh_codes[holder]) for holder in near), default=0)
        if most >= repeated:
            continue
        for code in codes:
            holders[code].append(len(fresh))
        fresh.append(chain)
        fresh_codes.append(codes)
    reason = f"{rules.repeated_share:.0%} or more of the rows in one earlier chain"
    return fresh, Gate("repeats", len(chains) - len(fresh), reason)


def number_gate(chains: Sequence[Chain], most: int) -> tuple[list[Chain], Gate]:
    """Keep the first `most` chains."""
    dropped = max(0, len(chains) - most)
    return list(chains[:most]), Gate("max_chains", dropped, f"more than the {most:,} asked for")


def row_codes(pool: Pool, base: Pool | None) -> tuple[Integers, Integers]:
    """Give equal rows of a pool and of a base the same integer code.

    Rows are equal if their texts are; if the pool or the base has no texts, if their float16
    vectors are.
    """
    code_N: Integers
    pools = [pool] if base is None else [pool, base]
    if all(one.text_N is not None for one in pools):
        # A row without a text equals no other.
        keys = np.concatenate([np.asarray(one.text_N, dtype=object) for one in pools])
        blank = np.flatnonzero(keys == "")
        keys[blank] = blank
        code_N, _ = pd.factorize(keys)
    else:
        digests = pd.DataFrame(np.concatenate([_vector_digests(one) for one in pools]))
        code_N = digests.groupby([0, 1], sort=False).ngroup().to_numpy()
    size = len(pool.lane_N)
    return code_N[:size], code_N[size:]


def _vector_digests(pool: Pool) -> npt.NDArray[np.uint64]:
    """Hash each row's float16 vector to 128 bits, as two numbers (N, 2)."""
    digest_N2 = np.empty((len(pool.lane_N), 2), dtype=np.uint64)
    for start in range(0, len(digest_N2), BLOCK_ROWS):
        block = pool.unit(slice(start, start + BLOCK_ROWS)).astype(np.float16)
        digests = [hashlib.blake2b(vector, digest_size=16).digest() for vector in block]
        numbers = np.frombuffer(b"".join(digests), dtype=np.uint64)
        digest_N2[start : start + len(block)] = numbers.reshape(-1, 2)
    return digest_N2


@dataclass(frozen=True, eq=False)
class Gated:
    """Chains over the rows of `pool` that passed every gate, and the drops of each gate.

    `least` is the least coherence; `coherence_C` is the coherence of the chains before this gate,
    `kept_C` of the kept chains, `adjacent_E` their adjacent cosines. `in_base` counts the distinct
    rows of the chains that are also rows of the base.
    """

    chains: list[Chain]
    pool: Pool
    dropped: list[Gate]
    least: float
    coherence_C: FloatArray
    kept_C: FloatArray
    adjacent_E: FloatArray
    in_base: int


def pass_gates(
    candidates: Candidates,
    model: Encoder | None,
    base: Bank | None,
    rule: CoherenceRule,
    rules: ChainRules,
    max_chains: int | None,
) -> Gated:
    """Apply all gates to the chains; concepts that are texts are encoded with `model`.

    Raises ValueError if a chain has a lane that the base does not have, or if no chain is left.
    """
    dropped: list[Gate] = []

    def passed(result: tuple[list[Chain], Gate]) -> list[Chain]:
        dropped.append(result[1])
        return result[0]

    chains = passed(length_gate(candidates.chains, rules))
    chains = passed(lane_gate(chains, candidates.pool.lane_N))
    if base is not None:
        check_lanes(chains, base)
    if isinstance(candidates.pool, Concepts):
        chains, pool, gate = _encoded(chains, candidates.pool, model)
        dropped.append(gate)
    else:
        pool = candidates.pool
    chains = passed(twin_gate(chains, pool, rules))
    if base is not None and candidates.answer_rows is not None:
        answer_QD = base.unit(candidates.answer_rows)
        chains = passed(answer_gate(chains, pool, answer_QD, rules))
    code_N, base_code_N = row_codes(pool, None if base is None else bank_pool(base))
    if base is not None:
        chains = passed(base_gate(chains, code_N, base_code_N))
    coherence_C, _ = coherence(chains, pool)
    least = rule.threshold(coherence_C)
    chains = passed(coherence_gate(chains, coherence_C, least))
    chains = passed(repeat_gate(chains, code_N, rules))
    if max_chains is not None:
        chains = passed(number_gate(chains, max_chains))
    if not chains:
        counts = ", ".join(f"{gate.name} {gate.dropped:,}" for gate in dropped if gate.dropped)
        notes = "".join(f"; {note}" for note in candidates.notes)
        raise ValueError(
            f"chains: none of {len(candidates.chains):,} of {candidates.kind} is left (dropped: "
            f"{counts or 'none'}{notes}); take a larger source, or lower what dropped them"
        )
    used = np.unique(code_N[flat_rows(chains)[0]])
    in_base = int(np.isin(used, base_code_N).sum())
    kept_C, adjacent_E = coherence(chains, pool)
    return Gated(chains, pool, dropped, least, coherence_C, kept_C, adjacent_E, in_base)


def _encoded(
    chains: Sequence[Chain], concepts: Concepts, model: Encoder | None
) -> tuple[list[Chain], Pool, Gate]:
    """Encode the concepts of the chains; drop chains that have a concept with a zero vector."""
    assert model is not None
    used_N = np.unique(flat_rows(chains)[0])
    texts = [concepts.text_N[row] for row in used_N]
    blocks, keep_N = encode_texts(texts, model)
    place = np.full(len(concepts.text_N), -1)
    place[used_N[keep_N]] = np.arange(keep_N.sum())
    moved = [chain._replace(rows=tuple(place[list(chain.rows)].tolist())) for chain in chains]
    whole = [chain for chain in moved if min(chain.rows) >= 0]
    stored = np.concatenate(blocks) if blocks else np.empty((0, model.dim), np.float16)
    kept_N = used_N[keep_N]
    text_N = np.array([concepts.text_N[row] for row in kept_N], dtype=object)
    pool = Pool(stored, concepts.lane_N[kept_N], text_N, model.name)
    reason = "a concept of whose text the encoder knows no token"
    return whole, pool, Gate("zero vectors", len(chains) - len(whole), reason)
