"""Every gate fires on what it must stop, on nothing else."""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest

from lvm.bank.bank import Bank
from lvm.chains import filters as gates
from lvm.chains.cpesh import mine
from lvm.chains.walks import Chain, Pool
from lvm.system.seeding import generator
from lvm.system.settings import read_chain_rules
from lvm.training.loss import TWIN_COSINE

RULES = read_chain_rules()


def make_pool(vectors: np.ndarray, lanes: list[str] | None = None, texts: bool = True) -> Pool:
    lane_N = np.array(lanes or ["a"] * len(vectors), dtype=object)
    text_N = np.array([f"text {row}" for row in range(len(vectors))], dtype=object)
    return Pool(vectors.astype(np.float32), lane_N, text_N if texts else None, "none")


def random_pool(num_rows: int = 60, dim: int = 8, texts: bool = True) -> Pool:
    return make_pool(generator(0, "pool").standard_normal((num_rows, dim)), texts=texts)


def chain(start: int, length: int = 8, step: int = 1) -> Chain:
    return Chain(f"head {start}", tuple(range(start, start + length * step, step)))


def test_the_length_gate():
    chains = [chain(0, length) for length in (7, 8, 14, 15)]
    kept, gate = gates.length_gate(chains, RULES)
    assert kept == chains[1:3]
    assert (gate.name, gate.dropped) == ("length", 2)


def test_the_lane_gate_names_the_lane_of_what_it_keeps():
    lane_N = np.array(["a"] * 8 + ["b"] * 8 + [""] * 8, dtype=object)
    kept, gate = gates.lane_gate([chain(0), chain(4), chain(8), chain(12), chain(16)], lane_N)
    assert [one.lane for one in kept] == ["a", "b", ""]  # without a lane is no lane 0
    assert gate.dropped == 2


def test_a_chain_for_a_lane_has_rows_of_this_lane():
    lane_N = np.array(["a"] * 8 + ["b"] * 8, dtype=object)
    asked = [chain(0)._replace(lane="b"), chain(8)._replace(lane="b")]
    kept, gate = gates.lane_gate(asked, lane_N)
    assert kept == asked[1:] and gate.dropped == 1
    kept, gate = gates.lane_gate(asked, np.full(16, "", dtype=object))
    assert kept == asked and gate.dropped == 0


def test_lanes_that_the_base_does_not_know_are_refused(tiny_bank: Bank):
    gates.check_lanes([chain(0)._replace(lane="lane-1"), chain(0)._replace(lane="")], tiny_bank)
    with pytest.raises(ValueError, match="lanes: noun.animal of the source is not a lane of base"):
        gates.check_lanes([chain(0)._replace(lane="noun.animal")], tiny_bank)


def test_the_twin_gate():
    vectors = generator(0, "twins").standard_normal((32, 8))
    vectors[5] = 2 * vectors[2]
    kept, gate = gates.twin_gate([chain(0), chain(3), chain(9, 12)], make_pool(vectors), RULES)
    assert kept == [chain(3), chain(9, 12)]
    assert gate.dropped == 1


def test_the_answer_gate():
    pool = random_pool()
    kept, gate = gates.answer_gate([chain(0), chain(10)], pool, pool.unit(np.array([4])), RULES)
    assert kept == [chain(10)] and gate.dropped == 1


@pytest.mark.parametrize(("score", "is_left"), [(0.9952, False), (0.9948, True)])
def test_what_training_takes_for_a_twin_of_an_answer_is_dropped(score, is_left):
    assert RULES.answer_twin == TWIN_COSINE < RULES.twin
    pool = make_pool(np.eye(16))
    answer_D = score * np.eye(16)[4] + np.sqrt(1 - score**2) * np.eye(16)[15]
    kept, _ = gates.answer_gate([chain(0)], pool, answer_D[None].astype(np.float32), RULES)
    assert bool(kept) == is_left


@pytest.mark.parametrize("texts", [True, False])
def test_the_base_gate_finds_runs_in_their_order_alone(texts):
    pool = random_pool(texts=texts)
    base = dataclasses.replace(
        pool,
        stored=pool.stored[10:30],
        lane_N=pool.lane_N[10:30],
        text_N=None if pool.text_N is None else pool.text_N[10:30],
    )
    code_N, base_code_N = gates.row_codes(pool, base)
    chains = [chain(12), chain(25), chain(5), Chain("back", tuple(range(20, 12, -1)))]
    kept, gate = gates.base_gate(chains, code_N, base_code_N)
    assert kept == chains[1:] and gate.dropped == 1


def test_the_coherence_gate_by_number_and_by_percentile():
    angle_N = np.concatenate([np.arange(10) * 0.1, np.arange(10) * 0.8, np.arange(10) * 1.2])
    pool = make_pool(np.stack([np.cos(angle_N), np.sin(angle_N)], axis=1))
    chains = [chain(0), chain(10), chain(20)]
    coherence_C, adjacent_E = gates.coherence(chains, pool)
    np.testing.assert_allclose(coherence_C, np.cos([0.1, 0.8, 1.2]), atol=1e-6)
    assert len(adjacent_E) == 3 * 7
    for text, least, left in (
        ("0.7", 0.7, chains[:1]),
        ("p50", np.cos(0.8), chains[:2]),
        ("0.9,p50", 0.9, chains[:1]),
        ("auto", np.mean(np.cos([0.8, 1.2])), chains[:2]),
    ):
        threshold = gates.coherence_rule(text, RULES).threshold(coherence_C)
        assert threshold == pytest.approx(least, abs=1e-6)
        kept, gate = gates.coherence_gate(chains, coherence_C, threshold)
        assert (kept, gate.dropped) == (left, 3 - len(left))


@pytest.mark.parametrize("text", ["banana", "1.5", "p200", "-1", "0.5,x", "nan", ""])
def test_a_wrong_coherence_is_refused(text):
    with pytest.raises(ValueError, match="coherence .*: must be auto, a cosine from 0 to 1"):
        gates.coherence_rule(text, RULES)


def test_the_repeat_gate_takes_sets_of_rows():
    turned = Chain("turned", tuple(reversed(chain(0).rows)))
    most = Chain("most", (*range(7), 30))  # 7 of 8 are in the first
    half = Chain("half", (*range(4), *range(30, 34)))
    kept, gate = gates.repeat_gate([chain(0), turned, most, half], np.arange(60), RULES)
    assert kept == [chain(0), half] and gate.dropped == 2
    same_N = np.arange(60) % 30  # row 30 says what row 0 says
    kept, gate = gates.repeat_gate([chain(0), chain(30)], same_N, RULES)
    assert kept == [chain(0)] and gate.dropped == 1


def plain_repeat_gate(chains: list[Chain], code_N: np.ndarray, share: float) -> list[Chain]:
    kept: list[Chain] = []
    for one in chains:
        codes = set(code_N[list(one.rows)].tolist())
        shared = [len(codes & set(code_N[list(other.rows)].tolist())) for other in kept]
        if max(shared, default=0) < share * len(codes):
            kept.append(one)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_repeats_are_those_of_the_comparison_with_every_earlier_chain(share):
    random = generator(1, "repeats")
    code_N = np.concatenate([np.zeros(5, int), random.integers(0, 60, size=55)])  # row 0 is a hub
    chains = [chain(0)]
    for number in range(600):
        rows = random.permutation(60)[: random.integers(8, 15)]
        if number % 2:
            earlier = chains[random.integers(len(chains))].rows
            rows = [*earlier[random.integers(0, 5) :], *rows][: len(rows)]
        chains.append(Chain("", tuple(int(row) for row in rows)))
    rules = dataclasses.replace(RULES, repeated_share=share)
    kept, gate = gates.repeat_gate(chains, code_N, rules)
    assert kept == plain_repeat_gate(chains, code_N, share)
    assert gate.dropped == len(chains) - len(kept) > 0


def test_a_row_in_every_chain_is_not_walked_over(monkeypatch):
    """Chains share one row alone: the earlier ones that hold it are never looked at."""
    looked_at = []

    class Holders(list):
        def __iter__(self):
            looked_at.extend(range(len(self)))
            return super().__iter__()

    monkeypatch.setattr(gates, "defaultdict", lambda kind: defaultdict(Holders))
    chains = [Chain("", (0, *range(1 + 9 * number, 10 + 9 * number))) for number in range(300)]
    kept, _ = gates.repeat_gate(chains, np.arange(3000), RULES)
    assert len(kept) == 300 and looked_at == []


def test_vectors_are_coded_by_digests_of_sixteen_bytes():
    pool = random_pool(texts=False)
    again = dataclasses.replace(pool, stored=np.roll(2 * pool.stored, 3, axis=0))
    code_N, again_N = gates.row_codes(pool, again)
    assert len(set(code_N.tolist())) == 60
    np.testing.assert_array_equal(again_N, np.roll(code_N, 3))
    assert gates._vector_digests(pool).nbytes == 60 * 16


def test_the_gate_of_the_number_asked_for():
    kept, gate = gates.number_gate([chain(0), chain(1), chain(2)], 2)
    assert kept == [chain(0), chain(1)] and gate.dropped == 1


def planted_pool() -> Pool:
    """Eight rows of a chain, ten at a cosine of 0.7 to all of them, ten orthogonal ones."""
    axis = np.eye(40)
    own = axis[0] + 0.01 * axis[1:9]
    soft = 0.7 * axis[0] + np.sqrt(1 - 0.49) * axis[10:20]
    return make_pool(np.concatenate([own, soft, axis[20:30]]))


def test_records_have_what_cpesh_says():
    pool = planted_pool()
    chains = [chain(0), chain(8, 10), chain(18, 10)]
    some = dataclasses.replace(RULES, min_attach=0.3, cpesh_steps=1)
    mined = mine(chains, pool, gates.coherence(chains, pool)[1], some, seed=0)
    assert (mined.bands.rule, mined.rate) == (
        "absolute",
        pytest.approx(2 / 3),
    )  # the orthogonal chain has no soft ones
    record = mined.records.to_dict("records")[0]
    assert (record["concept_row"], record["probe_row"], record["expected_row"]) == (0, 6, 7)
    assert (record["concept"], record["expected"]) == ("text 0", "text 7")
    assert set(record["soft_rows"]) <= set(range(8, 18)) and len(record["soft_rows"]) == 4
    assert set(record["hard_rows"]) <= set(range(18, 28)) and len(record["hard_rows"]) == 4
    unit = pool.unit(slice(None))
    np.testing.assert_allclose(
        record["soft_scores"], unit[record["soft_rows"]] @ unit[7], atol=1e-6
    )
    assert all(0.6 <= score < 0.8 for score in record["soft_scores"])
    assert all(score < 0.5 for score in record["hard_scores"])


def test_without_absolute_bands_the_percentiles_of_the_encoder_are_used_aloud():
    vectors = generator(0, "narrow").standard_normal((120, 8)) * 0.3 + 5  # every cosine near 1
    pool = make_pool(vectors)
    chains = [chain(start, 10) for start in range(0, 120, 10)]
    mined = mine(chains, pool, gates.coherence(chains, pool)[1], RULES, seed=0)
    assert mined.absolute_rate == 0 and mined.rate >= 0.95
    assert set(mined.records["rule"]) == {"percentiles"}
    assert 0.8 < mined.bands.hard_high <= mined.bands.soft_low < mined.bands.soft_high
    for record in mined.records.to_dict("records"):
        assert max(record["hard_scores"]) < mined.bands.hard_high
        assert min(record["soft_scores"]) >= mined.bands.soft_low


def test_too_few_records_are_an_error_that_names_the_rate():
    pool = random_pool()
    with pytest.raises(ValueError, match="CPESH: 0.0% of 1 chains have soft and hard negatives"):
        mine([chain(0)], pool, gates.coherence([chain(0)], pool)[1], RULES, seed=0)
