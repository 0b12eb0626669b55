"""The field of a shadow replay: registered versions beside the free predictors."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from entrypoints._inputs import DEFAULT_CTX, Inputs, make_inputs
from entrypoints._replay_bank import Known, is_made_from, open_replay_bank
from entrypoints._subjects import fit_free
from lvm.bank.store import Bank
from lvm.evaluation.evaluate import MAX_QUERIES
from lvm.models import fits
from lvm.models.facts import FREE, TRAINED, Facts
from lvm.models.table import FREE_MODELS
from lvm.retrieval.hubness import fit_hubness
from lvm.retrieval.lanes import check_lanes
from lvm.retrieval.rerank import reranker_if_lanes
from lvm.shadow.query_log import QueryLog, log_queries
from lvm.shadow.replay import Candidate
from lvm.tracking import alias
from lvm.tracking import versions as registered
from lvm.tracking.alias import BASELINE
from lvm.tracking.promotion import replayed_name
from lvm.tracking.versions import Card, LoggedFiles, Predictor
from lvm.windows.planning import SPLITS
from lvm.windows.queries import ContextQueries, Queries


@dataclass(frozen=True)
class Entrant:
    """One that takes part: what is known of it, and the predictor itself where it was fitted here.

    What was logged stays where it is until it is measured.
    """

    card: Card
    fitted: Predictor | None = None

    def candidate(self, name: str) -> Candidate:
        """Return it as a candidate of the replay."""
        card, fitted = self.card, self.fitted
        if fitted is None:
            return Candidate(name, None, card.facts, card.version, files=LoggedFiles(card))
        return Candidate(name, fitted.model, card.facts, card.version, fitted.row_correction)


@dataclass(frozen=True)
class Field:
    """All entrants of one replay by their names; the current baseline is among them."""

    inputs: Inputs
    entrants: dict[str, Entrant]
    baseline_version: str | None

    @property
    def candidates(self) -> list[Candidate]:
        """Return the candidates of the replay."""
        return [entrant.candidate(name) for name, entrant in self.entrants.items()]

    @property
    def versions(self) -> dict[str, str | None]:
        """Return the version of each candidate by its name."""
        return {name: entrant.card.version for name, entrant in self.entrants.items()}

    @property
    def baseline_name(self) -> str | None:
        """Return the name under which the current baseline is replayed; None without one.

        One whose tags cannot be read takes no part, and stands as its version's number.
        """
        return replayed_name(self.baseline_version, self.versions)


@dataclass(frozen=True)
class Wanted:
    """Who is to take part on which bank; None means that the candidates decide.

    With `candidates` all, trained versions of the bank are meant. `by_lane` needs lanes.
    """

    candidates: str
    bank: str | None = None
    ctx: int | None = None
    by_lane: bool = False


def gather(wanted: Wanted, register: bool, log: QueryLog | None = None) -> Field:
    """Find the candidates; fit the free predictors that have no version yet.

    `register` makes versions of what has none. The current baseline is always among them. The
    bank's hashes are checked; `log`, lanes are checked before anything is fitted or registered.
    """
    baseline = alias.aliases().get(BASELINE)
    known = {str(card.version): card for card in registered.cards()}
    for version, reason in registered.unreadable_versions().items():
        print(f"version {version} of {alias.NAME} takes no part: {reason}", flush=True)
    named = None if wanted.candidates == "all" else _named(wanted.candidates, known)
    bank = open_replay_bank(wanted.bank, Known(known, named, baseline), register)
    if log is not None:
        log_queries(log, bank, DEFAULT_CTX)
    cards = _trained_ones(known, bank) if named is None else named
    if baseline in known and baseline not in {card.version for card in cards}:
        cards.append(known[baseline])
    trained = [card.facts for card in cards if _is_trained_on(card, bank)]
    length = wanted.ctx or max((facts.ctx for facts in trained), default=DEFAULT_CTX)
    seed = split_seed(known.get(baseline or ""), trained, bank)
    inputs = make_inputs(bank, length, None, "shadow", split="document", seed=seed)
    if wanted.by_lane:
        check_lanes(bank, inputs.windows, seed)
    if register:
        cards = [_with_version(card) for card in cards]
    missing = set(FREE_MODELS) - {card.facts.model for card in cards if _is_free(card, inputs)}
    entrants = [_entrant(card, inputs) for card in cards] + _free_ones(missing, inputs, register)
    by_name = dict(zip(_names([one.card for one in entrants]), entrants, strict=True))
    return Field(inputs, by_name, baseline)


def split_seed(baseline: Card | None, trained: Sequence[Facts], bank: Bank) -> int:
    """Return the split's seed: the baseline's, else that of most trained candidates, else 0.

    Candidates of another seed were trained on other rows: some of the answers were among them.
    """
    if baseline is not None and is_made_from(baseline, bank) and not baseline.facts.leaky:
        return baseline.facts.seed
    counts = Counter(facts.seed for facts in trained if not facts.leaky)
    return min(counts, key=lambda seed: (-counts[seed], seed), default=0)


def choose_queries(
    log: QueryLog | None, inputs: Inputs, max_queries: int | None
) -> tuple[Queries, str]:
    """Return the first test queries of the frozen order, or those of a log; say what they are."""
    most = max_queries or MAX_QUERIES
    if log is None:
        frozen = inputs.windows.queries["test"]
        part = f"the first {most:,} of " if most < len(frozen) else ""
        return frozen.head(most), f"{part}the frozen test split"
    queries = log_queries(log, inputs.bank, inputs.windows.ctx)
    asked = queries.head(most)
    split_Q = inputs.windows.split_N[asked.target_row_Q]
    counts = np.bincount(split_Q, minlength=len(SPLITS))
    shares = ", ".join(f"{num:,} {name}" for name, num in zip(SPLITS, counts, strict=True))
    served = isinstance(asked, ContextQueries)
    contexts = "its recorded context" if served else "the rows before it"
    part = f"the first {len(asked):,} of " if len(asked) < len(queries) else ""
    return asked, (
        f"{part}the log {log.path.name}, each asked from {contexts}; rows by split: {shares}"
    )


def _named(candidates: str, known: dict[str, Card]) -> list[Card]:
    """Find what the words name: versions, URIs; free predictors, named or not, take part anyway."""
    cards: dict[str, Card] = {}
    for word in filter(None, (word.strip() for word in candidates.split(","))):
        if word in FREE_MODELS:
            continue
        if "/" not in word and word not in known:
            raise ValueError(
                f"candidates: {alias.NAME} has no version {word!r}; known: "
                f"{', '.join(known) or 'none'}; or give models:/{alias.NAME}@<alias>, "
                f"runs:/<run id>/{alias.ARTIFACT} or models:/m-<id>"
            )
        card = registered.read_card(word) if "/" in word else known[word]
        assert card.model_id is not None
        version = card.version or registered.version_of(card.model_id)
        cards.setdefault(card.model_id, dataclasses.replace(card, version=version))
    return list(cards.values())


def _trained_ones(known: dict[str, Card], bank: Bank) -> list[Card]:
    """Return every trained version of this bank, the newest first."""
    return [card for card in reversed(known.values()) if _is_trained_on(card, bank)]


def _is_trained_on(card: Card, bank: Bank) -> bool:
    return card.facts.kind == TRAINED and is_made_from(card, bank)


def _with_version(card: Card) -> Card:
    """Register a model that has no version yet, for only a version can take the alias."""
    if card.version is not None:
        return card
    assert card.model_id is not None
    return dataclasses.replace(card, version=registered.register(card.model_id, card.facts))


def _entrant(card: Card, inputs: Inputs) -> Entrant:
    """Return what the card names; the row correction of a base bank's model is fitted anew here.

    It was made for the rows of the base alone. What cannot be read takes part as it lies there, and
    is told when it is measured.
    """
    if card.facts.bank_sha256 not in inputs.bank.bases:
        return Entrant(card)
    try:
        return Entrant(card, _with_correction(registered.load(card.reference), inputs))
    except ValueError:
        return Entrant(card)


def _is_free(card: Card, inputs: Inputs) -> bool:
    """Tell whether it is a free predictor fitted in this way on the very windows of this replay."""
    facts, windows = card.facts, inputs.windows
    made_from = (facts.bank_sha256, facts.windows_sha256, facts.ctx, facts.fit_version)
    wanted = (inputs.bank.sha256, windows.sha256, windows.ctx, fits.VERSION)
    return facts.kind == FREE and made_from == wanted


def _free_ones(names: set[str], inputs: Inputs, register: bool) -> list[Entrant]:
    """Return these free predictors: registered ones of the same windows, else fitted ones."""
    entrants = []
    for name in (name for name in FREE_MODELS if name in names):
        card = _registered_free(name, inputs)
        if card is not None:
            entrants.append(Entrant(card))
            continue
        fitted = _with_correction(fit_free(name, inputs), inputs)
        entrants.append(_registered(fitted, inputs) if register else Entrant(fitted, fitted))
    return entrants


def _registered_free(name: str, inputs: Inputs) -> Card | None:
    """Return the newest version of a free predictor of the same windows that can be read."""
    for card in reversed(registered.cards()):
        if card.facts.model == name and _is_free(card, inputs):
            try:
                registered.load(card.reference)
            except ValueError as error:
                print(f"{name} is fitted anew: {error}", flush=True)
                continue
            return card
    return None


def _with_correction(one: Predictor, inputs: Inputs) -> Predictor:
    hubness = fit_hubness(one.model, inputs.bank, inputs.windows, inputs.windows.seed)
    return dataclasses.replace(one, row_correction=hubness.row_correction)


def _registered(one: Predictor, inputs: Inputs) -> Entrant:
    """Register a fitted predictor, or return the version that another process made meanwhile."""
    with alias.locked():
        there = _registered_free(one.facts.model, inputs)
        if there is not None:
            return Entrant(there)
        bank, windows = inputs.bank, inputs.windows
        assert one.row_correction is not None
        reranker = reranker_if_lanes(one.model, bank, windows, one.row_correction, windows.seed)
        model_id = registered.log_predictor(
            one.model, one.facts, one.row_correction, reranker=reranker
        )
        version = registered.register(model_id, one.facts)
        reference = f"models:/{alias.NAME}/{version}"
        return Entrant(Card(reference, one.facts, model_id, version=version))


def _names(cards: Sequence[Card]) -> list[str]:
    """Return unique names: the model's, with its ctx or else its version where it has rivals."""
    names = []
    for one in cards:
        rivals = [other for other in cards if other.facts.model == one.facts.model]
        lengths = {other.facts.ctx for other in rivals}
        if len(rivals) == 1:
            names.append(one.facts.model)
        elif len(lengths) == len(rivals):
            names.append(f"{one.facts.model}-ctx{one.facts.ctx}")
        else:
            names.append(f"{one.facts.model}-{_number(one)}")
    return names


def _number(one: Card) -> str:
    """Return what tells a predictor from its namesakes: its version, else its model's id."""
    if one.version is not None:
        return f"v{one.version}"
    return "new" if one.model_id is None else one.model_id[:10]
