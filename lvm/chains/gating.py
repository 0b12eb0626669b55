"""The order of the gates, with what they leave.

Shapes: N concepts of a pool, C chains, E adjacent pairs of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lvm.bank.store import Bank, FloatArray
from lvm.chains import gates
from lvm.chains.concepts import Candidates, Chain, Concepts, Pool, bank_pool, flat_rows
from lvm.chains.gates import CoherenceRule, Gate
from lvm.corpus.encoders import Encoder
from lvm.corpus.ingest import encode_texts
from lvm.system.thresholds import ChainRules


@dataclass(frozen=True, eq=False)
class Gated:
    """Chains that passed every gate over the rows of `pool`, with the count of each gate.

    `least` is the coherence asked for; `coherence_C` that of the chains before this gate, `kept_C`
    that of the chains kept, `adjacent_E` the adjacent cosines of these. `in_base` counts distinct
    rows of the chains that the base has, too.
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
    """Put the chains through all gates; texts are encoded on the way, by `model`.

    Raises ValueError where a chain's lane is none of the base's, or where no chain is left.
    """
    dropped: list[Gate] = []

    def passed(result: tuple[list[Chain], Gate]) -> list[Chain]:
        dropped.append(result[1])
        return result[0]

    chains = passed(gates.length_gate(candidates.chains, rules))
    chains = passed(gates.lane_gate(chains, candidates.pool.lane_N))
    if base is not None:
        gates.check_lanes(chains, base)
    if isinstance(candidates.pool, Concepts):
        chains, pool, gate = _encoded(chains, candidates.pool, model)
        dropped.append(gate)
    else:
        pool = candidates.pool
    chains = passed(gates.twin_gate(chains, pool, rules))
    if base is not None and candidates.answer_rows is not None:
        answer_QD = base.unit(candidates.answer_rows)
        chains = passed(gates.answer_gate(chains, pool, answer_QD, rules))
    code_N, base_code_N = gates.row_codes(pool, None if base is None else bank_pool(base))
    if base is not None:
        chains = passed(gates.base_gate(chains, code_N, base_code_N))
    coherence_C, _ = gates.coherence(chains, pool)
    least = rule.threshold(coherence_C)
    chains = passed(gates.coherence_gate(chains, coherence_C, least))
    chains = passed(gates.repeat_gate(chains, code_N, rules))
    if max_chains is not None:
        chains = passed(gates.number_gate(chains, max_chains))
    if not chains:
        counts = ", ".join(f"{gate.name} {gate.dropped:,}" for gate in dropped if gate.dropped)
        notes = "".join(f"; {note}" for note in candidates.notes)
        raise ValueError(
            f"chains: none of {len(candidates.chains):,} of {candidates.kind} is left (dropped: "
            f"{counts or 'none'}{notes}); take a larger source, or lower what dropped them"
        )
    used = np.unique(code_N[flat_rows(chains)[0]])
    in_base = int(np.isin(used, base_code_N).sum())
    kept_C, adjacent_E = gates.coherence(chains, pool)
    return Gated(chains, pool, dropped, least, coherence_C, kept_C, adjacent_E, in_base)


def _encoded(
    chains: Sequence[Chain], concepts: Concepts, model: Encoder | None
) -> tuple[list[Chain], Pool, Gate]:
    """Encode the concepts of the chains; drop chains with a concept whose vector is zero."""
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
