"""Find the candidates of a shadow replay: registered versions beside the free predictors."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lvm.bank.store import Bank
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.models import fits
from lvm.models.facts import FREE, TRAINED, facts_of
from lvm.models.table import FREE_MODELS
from lvm.retrieval.hubness import fit_hubness
from lvm.retrieval.lanes import check_lanes
from lvm.retrieval.rerank import reranker_if_lanes
from lvm.shadow.query_log import QueryLog, log_queries
from lvm.shadow.replay import Candidate, is_made_from, split_seed, unique_names
from lvm.tracking import alias, logged_models
from lvm.tracking import versions as registered
from lvm.tracking.alias import BASELINE
from lvm.tracking.datasets import DEFAULT_CTX, make_inputs
from lvm.tracking.logged_models import LoggedFiles
from lvm.tracking.promotion import replayed_name
from lvm.tracking.runs import Dataset
from lvm.tracking.versions import Card
from lvm.windows.planning import Windows


@dataclass(frozen=True)
class Field:
    """All candidates of one replay, the current baseline among them, and what they are asked on."""

    bank: Bank
    windows: Windows
    dataset: Dataset
    candidates: tuple[Candidate, ...]
    baseline_version: str | None

    @property
    def versions(self) -> dict[str, str | None]:
        """Return the version of each candidate by its name."""
        return {one.name: one.version for one in self.candidates}

    @property
    def baseline_name(self) -> str | None:
        """Return the name under which the current baseline is replayed; None without one.

        If its tags cannot be read it takes no part, and its name is `version <number>`.
        """
        return replayed_name(self.baseline_version, self.versions)


@dataclass(frozen=True)
class Wanted:
    """Which candidates take part, on which bank; None lets the candidates decide.

    `candidates` is a list with commas, or "all" for every trained version of the bank. `by_lane`
    needs a bank with lanes. `register` makes versions of candidates that have none.
    """

    candidates: str
    bank: str | None = None
    ctx: int | None = None
    by_lane: bool = False
    register: bool = False


@dataclass(frozen=True)
class Registry:
    """The readable versions by number, oldest first; those named, or None if all are meant.

    `baseline` is the version that has the alias.
    """

    versions: dict[str, Card]
    named: Sequence[Card] | None
    baseline: str | None

    @property
    def trained(self) -> list[Card]:
        """Return the trained ones of those named, or of all."""
        cards = self.named or self.versions.values()
        return [card for card in cards if card.facts.kind == TRAINED]


def gather(
    wanted: Wanted, read_bank: Callable[[str | None], Bank], log: QueryLog | None = None
) -> Field:
    """Find the candidates, and fit the free predictors that have no version of these windows yet.

    `read_bank` opens the bank at a path with its hashes checked, None being the default bank. `log`
    and lanes are checked before anything is fitted or registered. Bank and windows are logged as
    datasets of the active run.
    """
    known = {str(card.version): card for card in registered.cards()}
    for version, reason in registered.unreadable_versions().items():
        print(f"version {version} of {alias.NAME} takes no part: {reason}", flush=True)
    named = None if wanted.candidates == "all" else _named(wanted.candidates, known)
    registry = Registry(known, named, alias.aliases().get(BASELINE))
    bank = choose_bank(wanted.bank, registry, wanted.register, read_bank)
    if log is not None:
        log_queries(log, bank, DEFAULT_CTX)
    cards = list(named) if named is not None else _trained_on(known, bank)
    baseline = known.get(registry.baseline or "")
    if baseline is not None and baseline.version not in {card.version for card in cards}:
        cards.append(baseline)
    trained = [c.facts for c in cards if c.facts.kind == TRAINED and is_made_from(c.facts, bank)]
    length = wanted.ctx or max((facts.ctx for facts in trained), default=DEFAULT_CTX)
    seed = split_seed(None if baseline is None else baseline.facts, trained, bank)
    inputs = make_inputs(bank, length, None, "shadow", split="document", seed=seed)
    windows = inputs.windows
    if wanted.by_lane:
        check_lanes(bank, windows, seed)
    if wanted.register:
        cards = [_with_version(card) for card in cards]
    there = {card.facts.model for card in cards if _is_free(card, bank, windows)}
    free = [
        _free(name, bank, windows, wanted.register) for name in FREE_MODELS if name not in there
    ]
    found = [_candidate(card, bank, windows) for card in cards] + free
    named_now = [
        dataclasses.replace(one, name=name)
        for one, name in zip(found, unique_names(found), strict=True)
    ]
    return Field(bank, windows, inputs.dataset, tuple(named_now), registry.baseline)


def choose_bank(
    path: str | None,
    registry: Registry,
    promote: bool,
    read_bank: Callable[[str | None], Bank],
) -> Bank:
    """Open the bank at `path`, or that of a version; print which, and which versions it omits.

    Raises ValueError if another bank lies there now than the version was made from, or if several
    banks have versions, none has a baseline yet, and the user has not named one.
    """
    card, role = (None, "") if path is not None else _bank_giver(registry)
    bank = read_bank(path or (None if card is None else card.facts.bank))
    foreign = [one for one in registry.trained if not is_made_from(one.facts, bank)]
    if card is not None:
        if not is_made_from(card.facts, bank):
            raise ValueError(
                f"bank: {_numbers([card])}, {role}, was made from another bank than lies at "
                f"{bank.path} now ({card.facts.bank_sha256[:12]}, not {bank.sha256[:12]}); "
                "give bank=<path of the one to replay on>"
            )
        if promote and registry.baseline is None and foreign:
            raise ValueError(
                f"bank: none was given, there is no baseline yet, and {_numbers([card])} is of "
                f"{bank.path}, {_numbers(foreign)} of other banks; give bank=<path of the one "
                "whose alias it shall be>"
            )
    told = []
    if path is None:
        origin = "the default" if card is None else f"of {_numbers([card])}, {role}"
        told.append(f"bank {bank.path} ({origin})")
    omitted = [one for one in foreign if one.version != registry.baseline]
    if omitted and registry.named is None:
        told.append(f"left out, as of other banks: {_numbers(omitted)}; give bank=<path> for those")
    if told:
        print("; ".join(told), flush=True)
    return bank


def _bank_giver(registry: Registry) -> tuple[Card | None, str]:
    """Return the version whose bank is used, with its role; None if there is no version."""
    if registry.named:
        return registry.named[0], "the first named"
    if registry.trained:
        return registry.trained[-1], "the newest trained"
    baseline = registry.versions.get(registry.baseline or "")
    if baseline is not None:
        return baseline, "the baseline"
    return next(reversed(registry.versions.values()), None), "the newest"


def _numbers(cards: Sequence[Card]) -> str:
    numbers = ", ".join(card.version or card.reference for card in cards)
    return f"version{'s' if len(cards) > 1 else ''} {numbers}"


def _named(candidates: str, known: dict[str, Card]) -> list[Card]:
    """Return the versions and URIs of the list; free predictors take part without being named."""
    cards: dict[str, Card] = {}
    for word in filter(None, (word.strip() for word in candidates.split(","))):
        if word in FREE_MODELS:
            continue
        if "/" not in word and word not in known:
            raise ValueError(
                f"candidates: {alias.NAME} has no version {word!r}; known: "
                f"{', '.join(known) or 'none'}; or give models:/{alias.NAME}@<alias>, "
                f"runs:/<run id>/{registered.ARTIFACT} or models:/m-<id>"
            )
        card = logged_models.read_card(word) if "/" in word else known[word]
        assert card.model_id is not None
        version = card.version or registered.version_of(card.model_id)
        cards.setdefault(card.model_id, dataclasses.replace(card, version=version))
    return list(cards.values())


def _trained_on(known: dict[str, Card], bank: Bank) -> list[Card]:
    """Return every trained version of this bank, the newest first."""
    newest_first = reversed(known.values())
    return [c for c in newest_first if c.facts.kind == TRAINED and is_made_from(c.facts, bank)]


def _with_version(card: Card) -> Card:
    """Register a model that has no version yet: only a version can take the alias."""
    if card.version is not None:
        return card
    assert card.model_id is not None
    return dataclasses.replace(card, version=registered.register(card.model_id, card.facts))


def _candidate(card: Card, bank: Bank, windows: Windows) -> Candidate:
    """Return the candidate of a card; weights are downloaded only when it is measured.

    The model of a bank that this one extends is loaded at once, since its row correction has to be
    fitted again for the added rows. Unreadable models still enter; the error is reported when they
    are measured.
    """
    logged = _logged(card)
    if card.facts.bank_sha256 not in bank.bases:
        return logged
    try:
        model = logged_models.load(card.reference).model
    except ValueError:
        return logged
    correction = fit_hubness(model, bank, windows, windows.seed).row_correction
    return dataclasses.replace(logged, model=model, row_correction=correction, files=None)


def _logged(card: Card) -> Candidate:
    facts, files = card.facts, LoggedFiles(card)
    return Candidate(facts.model, None, facts, card.version, files=files, model_id=card.model_id)


def _free(name: str, bank: Bank, windows: Windows, register: bool) -> Candidate:
    """Return a free predictor: a registered one of the same windows, else one fitted now."""
    card = _registered_free(name, bank, windows)
    if card is not None:
        return _logged(card)
    model = fit_free_predictors(bank, windows, (name,), seed=windows.seed)[name]
    correction = fit_hubness(model, bank, windows, windows.seed).row_correction
    facts = facts_of(name, "none", bank, windows)
    fitted = Candidate(name, model, facts, row_correction=correction)
    if not register:
        return fitted
    with alias.locked():  # another process may have registered it meanwhile
        card = _registered_free(name, bank, windows)
        if card is not None:
            return _logged(card)
        reranker = reranker_if_lanes(model, bank, windows, correction, windows.seed)
        model_id = logged_models.log_predictor(model, facts, correction, reranker=reranker)
        version = registered.register(model_id, facts)
        reference = f"models:/{alias.NAME}/{version}"
        return _logged(Card(reference, facts, model_id, version=version))


def _is_free(card: Card, bank: Bank, windows: Windows) -> bool:
    """Tell whether it is a free predictor fitted by this code on these very windows."""
    facts = card.facts
    made_from = (facts.bank_sha256, facts.windows_sha256, facts.ctx, facts.fit_version)
    return facts.kind == FREE and made_from == (
        bank.sha256,
        windows.sha256,
        windows.ctx,
        fits.VERSION,
    )


def _registered_free(name: str, bank: Bank, windows: Windows) -> Card | None:
    """Return the newest readable version of a free predictor of the same windows."""
    for card in reversed(registered.cards()):
        if card.facts.model == name and _is_free(card, bank, windows):
            try:
                logged_models.load(card.reference)
            except ValueError as error:
                print(f"{name} is fitted anew: {error}", flush=True)
                continue
            return card
    return None
