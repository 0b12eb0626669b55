"""Candidates of a shadow replay: found in the registry, logged, tagged, promoted."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from lvm.bank.bank import Bank
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.models import weights
from lvm.models.facts import FREE, TRAINED, facts_of, omits_own_document
from lvm.models.table import FREE_MODELS
from lvm.report.shadow import (
    forest_figure,
    rank_figure,
    shadow_lane_figure,
    shadow_markdown,
    shadow_note,
    shadow_text,
)
from lvm.report.tables import HITS, hit_metrics
from lvm.retrieval.hubness import fit_hubness
from lvm.retrieval.rerank import NONE, check_rerank, fit_reranker
from lvm.shadow.comparison import Outcome, ShadowResult
from lvm.shadow.promotion_gates import Decision, Past, decide
from lvm.shadow.query_log import Log, log_queries
from lvm.shadow.replay import Candidate, is_made_from, split_seed, unique_names
from lvm.system.processes import defer_signals
from lvm.system.settings import GateRules
from lvm.tracking import logged_models, runs
from lvm.tracking.datasets import DEFAULT_BANK, DEFAULT_CTX, default_ctx, make_inputs, read_bank
from lvm.tracking.logged_models import LoggedFiles
from lvm.tracking.registry import (
    ARTIFACT,
    BASELINE,
    DECIDED,
    DEFAULT,
    LOG,
    SHADOW,
    Card,
    Registry,
    locked,
    metric_tags,
)
from lvm.tracking.runs import Dataset
from lvm.windows.planning import Windows

FIGURES = {"forest.png": forest_figure, "hits.png": rank_figure, "lanes.png": shadow_lane_figure}
Publish = Callable[[Decision], None]
TellFailure = Callable[[Decision, tuple[str, ...], str], None]


@dataclass(frozen=True)
class Field:
    """All candidates of one replay (the baseline among them), and the data to ask them on."""

    bank: Bank
    windows: Windows
    dataset: Dataset
    candidates: tuple[Candidate, ...]
    baseline_version: str | None
    registry: Registry = DEFAULT

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

    `candidates` is a list with commas, or "all" for every trained version of the bank; numbers are
    versions of `registry`, of which the winner becomes the baseline. All candidates have the second
    stage `rerank`, for which the bank needs lanes or texts. `register` makes versions of candidates
    that have none.
    """

    candidates: str
    bank: str | None = None
    ctx: int | None = None
    rerank: str = NONE
    register: bool = False
    registry: Registry = DEFAULT


@dataclass(frozen=True)
class Registered:
    """The readable versions by number, oldest first; `named` is None if all are meant.

    `baseline` is the version that has the alias.
    """

    versions: dict[str, Card]
    named: Sequence[Card] | None
    baseline: str | None

    @property
    def trained(self) -> list[Card]:
        """Return the trained versions among those named, or among all."""
        cards = self.named or self.versions.values()
        return [card for card in cards if card.facts.kind == TRAINED]


def gather(wanted: Wanted, log: Log | None = None) -> Field:
    """Find the candidates; fit the free predictors that have no version for these windows.

    `log` and lanes are checked before anything is fitted or registered. Bank and windows are logged
    as datasets of the active run.
    """
    registry = wanted.registry
    known = {str(card.version): card for card in registry.cards()}
    for version, reason in registry.unreadable_versions().items():
        print(f"version {version} of {registry.name} takes no part: {reason}", flush=True)
    named = None if wanted.candidates == "all" else _named(wanted.candidates, registry, known)
    registered = Registered(known, named, registry.aliases().get(BASELINE))
    bank = choose_bank(wanted.bank, registered, wanted.register, read_bank)
    registry.check_bank(bank)
    if log is not None:
        log_queries(log, bank, DEFAULT_CTX)
    cards = list(named) if named is not None else _trained_on(known, bank)
    baseline = known.get(registered.baseline or "")
    if baseline is not None and baseline.version not in {card.version for card in cards}:
        cards.append(baseline)
    trained = [c.facts for c in cards if c.facts.kind == TRAINED and is_made_from(c.facts, bank)]
    longest = max((facts.ctx for facts in trained), default=DEFAULT_CTX)
    seed = split_seed(None if baseline is None else baseline.facts, trained, bank)
    inputs = make_inputs(
        bank, wanted.ctx or default_ctx(bank, longest), None, "shadow", split="document", seed=seed
    )
    windows = inputs.windows
    check_rerank(wanted.rerank, bank, windows, seed)
    if wanted.register:
        cards = [_with_version(card, registry) for card in cards]
    there = {card.facts.model for card in cards if _is_free(card, bank, windows)}
    free = [_free(name, bank, windows, wanted) for name in FREE_MODELS if name not in there]
    found = [_candidate(card, bank, windows) for card in cards] + free
    named_now = [
        dataclasses.replace(one, name=name)
        for one, name in zip(found, unique_names(found), strict=True)
    ]
    return Field(bank, windows, inputs.dataset, tuple(named_now), registered.baseline, registry)


def choose_bank(
    path: str | None,
    registered: Registered,
    promote: bool,
    read: Callable[[str], Bank],
) -> Bank:
    """Open the bank at `path`, or that of a version; print which, and which versions it omits.

    Raises ValueError if the bank has changed since the version was made, or if several banks have
    versions, none has a baseline, and the user named none.
    """
    card, role = (None, "") if path is not None else _bank_giver(registered)
    bank = read(path or (DEFAULT_BANK if card is None else card.facts.bank))
    foreign = [one for one in registered.trained if not is_made_from(one.facts, bank)]
    if card is not None:
        if not is_made_from(card.facts, bank):
            raise ValueError(
                f"bank: {_numbers([card])}, {role}, was made from another bank than lies at "
                f"{bank.path} now ({card.facts.bank_sha256[:12]}, not {bank.sha256[:12]}); "
                "give bank=<path of the one to replay on>"
            )
        if promote and registered.baseline is None and foreign:
            raise ValueError(
                f"bank: none was given, there is no baseline yet, and {_numbers([card])} is of "
                f"{bank.path}, {_numbers(foreign)} of other banks; give bank=<path of the one "
                "whose alias it shall be>"
            )
    lines = []
    if path is None:
        origin = "the default" if card is None else f"of {_numbers([card])}, {role}"
        lines.append(f"bank {bank.path} ({origin})")
    omitted = [one for one in foreign if one.version != registered.baseline]
    if omitted and registered.named is None:
        lines.append(
            f"left out, as of other banks: {_numbers(omitted)}; give bank=<path> for those"
        )
    if lines:
        print("; ".join(lines), flush=True)
    return bank


def _bank_giver(registered: Registered) -> tuple[Card | None, str]:
    """Return the version whose bank is used, with its role; None if there is no version."""
    if registered.named:
        return registered.named[0], "the first named"
    if registered.trained:
        return registered.trained[-1], "the newest trained"
    baseline = registered.versions.get(registered.baseline or "")
    if baseline is not None:
        return baseline, "the baseline"
    return next(reversed(registered.versions.values()), None), "the newest"


def _numbers(cards: Sequence[Card]) -> str:
    numbers = ", ".join(card.version or card.reference for card in cards)
    return f"version{'s' if len(cards) > 1 else ''} {numbers}"


def _named(candidates: str, registry: Registry, known: dict[str, Card]) -> list[Card]:
    """Return the versions and URIs of the list; free predictors take part without being named."""
    cards: dict[str, Card] = {}
    for word in filter(None, (word.strip() for word in candidates.split(","))):
        if word in FREE_MODELS:
            continue
        if "/" not in word and word not in known:
            raise ValueError(
                f"candidates: {registry.name} has no version {word!r}; known: "
                f"{', '.join(known) or 'none'}; or give models:/{registry.name}@<alias>, "
                f"runs:/<run id>/{ARTIFACT} or models:/m-<id>"
            )
        card = logged_models.read_card(word) if "/" in word else known[word]
        assert card.model_id is not None
        own = card.version if card.registry == registry.name else None
        version = own or registry.version_of(card.model_id)
        unregistered = dataclasses.replace(card, version=None, registry=None)
        cards.setdefault(card.model_id, known.get(version or "", unregistered))
    return list(cards.values())


def _trained_on(known: dict[str, Card], bank: Bank) -> list[Card]:
    """Return every trained version of this bank, the newest first."""
    newest_first = reversed(known.values())
    return [c for c in newest_first if c.facts.kind == TRAINED and is_made_from(c.facts, bank)]


def _with_version(card: Card, registry: Registry) -> Card:
    """Register a model that has no version yet: only a version can take the alias."""
    if card.version is not None:
        return card
    assert card.model_id is not None
    version = registry.register(card.model_id, card.facts)
    return dataclasses.replace(card, version=version, registry=registry.name)


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
    omits_own = omits_own_document(card.facts.fit_version)
    correction = fit_hubness(model, bank, windows, windows.seed, omits_own).row_correction
    return dataclasses.replace(logged, model=model, row_correction=correction, files=None)


def _logged(card: Card) -> Candidate:
    facts, files = card.facts, LoggedFiles(card)
    found = Candidate(facts.model, None, facts, card.version, files=files, model_id=card.model_id)
    return dataclasses.replace(found, val_hit_at_5=card.val_hit_at_5)


def _free(name: str, bank: Bank, windows: Windows, wanted: Wanted) -> Candidate:
    """Return a free predictor: a registered one of the same windows, else one fitted now."""
    registry = wanted.registry
    card = _registered_free(name, bank, windows, registry)
    if card is not None:
        return _logged(card)
    model = fit_free_predictors(bank, windows, (name,), seed=windows.seed)[name]
    correction = fit_hubness(model, bank, windows, windows.seed).row_correction
    facts = facts_of(name, "none", bank, windows)
    if not wanted.register:
        return Candidate(name, model, facts, row_correction=correction)
    with locked():  # another process may have registered it meanwhile
        card = _registered_free(name, bank, windows, registry)
        if card is not None:
            return _logged(card)
        reranker = fit_reranker(model, bank, windows, correction, windows.seed)
        model_id = logged_models.log_predictor(model, facts, correction, reranker=reranker)
        version = registry.register(model_id, facts)
        uri = registry.uri(version)
        return _logged(Card(uri, facts, model_id, version=version, registry=registry.name))


def _is_free(card: Card, bank: Bank, windows: Windows) -> bool:
    """Tell whether it is a free predictor fitted by this code on these very windows."""
    facts = card.facts
    made_from = (facts.bank_sha256, facts.windows_sha256, facts.ctx, facts.fit_version)
    return facts.kind == FREE and made_from == (
        bank.sha256,
        windows.sha256,
        windows.ctx,
        weights.FIT_VERSION,
    )


def _registered_free(name: str, bank: Bank, windows: Windows, registry: Registry) -> Card | None:
    """Return the newest readable version of a free predictor of the same windows."""
    for card in reversed(registry.cards()):
        if card.facts.model == name and _is_free(card, bank, windows):
            try:
                logged_models.load(card.reference)
            except ValueError as error:
                print(f"{name} is fitted again: {error}", flush=True)
                continue
            return card
    return None


def promote_winner(
    registry: Registry,
    result: ShadowResult,
    version_by_name: Mapping[str, str | None],
    rules: GateRules,
    run_id: str,
    publish: Publish,
    tell_failure: TellFailure | None,
) -> Decision:
    """Decide, publish, then move the alias; return the decision. A dry run has no `tell_failure`.

    `version_by_name` gives the version of each candidate. The alias is read again under the
    registry's lock, which is held to the end: of two simultaneous promotions the second decides
    after the first. Versions to promote are loaded whole, then `publish` is called, then the alias
    moves, so every move has a report; stop signals are deferred. If a move fails, `tell_failure`
    receives the names that took the alias and the reason why the next one did not; the error is
    raised again.
    """
    is_enabled = tell_failure is not None
    with ExitStack() as held:
        if is_enabled:
            held.enter_context(locked())
            held.enter_context(defer_signals())
            registry.repair()
        expected = registry.aliases().get(BASELINE)
        past = _past(registry, result, version_by_name, expected)
        decision = decide(result, replayed_name(expected, version_by_name), rules, past)
        if is_enabled:
            for name in decision.promote:
                logged_models.load(registry.uri(str(version_by_name[name])))
        publish(decision)
        if is_enabled:
            _record_loss(registry, result, decision, version_by_name, run_id)
        moved: tuple[str, ...] = ()
        try:
            for name in decision.promote if is_enabled else ():
                version = str(version_by_name[name])
                evidence = _evidence(name, decision, result, run_id)
                evidence["replaced_version"] = str(expected).lower()
                registry.promote(version, expected, evidence)
                expected, moved = version, (*moved, name)
        except BaseException as error:
            assert tell_failure is not None
            tell_failure(decision, moved, " ".join(str(error).split()) or type(error).__name__)
            raise
    return decision


def _past(
    registry: Registry,
    result: ShadowResult,
    version_by_name: Mapping[str, str | None],
    baseline: str | None,
) -> Past:
    """Return the earlier decisions that concern this replay, under the names of its candidates."""
    withdrawn = registry.withdrawn()
    lost = {} if baseline is None else registry.losses(baseline, result.queries_sha256)
    versions = {name: version for name, version in version_by_name.items() if version is not None}
    return Past(
        withdrawn=frozenset(name for name, version in versions.items() if version in withdrawn),
        lost={name: lost[version] for name, version in versions.items() if version in lost},
    )


def _record_loss(
    registry: Registry,
    result: ShadowResult,
    decision: Decision,
    version_by_name: Mapping[str, str | None],
    run_id: str,
) -> None:
    """Record the challenger that ended the tests: it is not tested again on the same queries."""
    version = version_by_name.get(decision.failed or "")
    incumbent = version_by_name.get(decision.baseline or result.best_free or "")
    if version is not None and incumbent is not None:
        registry.record_loss(version, incumbent, result.queries_sha256, run_id)


def replayed_name(version: str | None, version_by_name: Mapping[str, str | None]) -> str | None:
    """Return the name under which a version is replayed, or its number if it is not replayed.

    A replay names its baseline by the same rule: if the names differ, the alias has moved since.
    """
    if version is None:
        return None
    names = (name for name, other in version_by_name.items() if other == version)
    return next(names, f"version {version}")


def tag_measured(
    registry: Registry,
    result: ShadowResult,
    version_by_name: Mapping[str, str | None],
    run_id: str,
    verdicts: Mapping[str, str],
) -> None:
    """Tag every version of the replay with its metrics, their run and its verdict.

    Metrics on a query log have the prefix `log_`, those on the frozen test split `shadow_`. An
    unscored candidate keeps its earlier metrics; the tag `<prefix>unscored` says why.
    """
    prefix = LOG if result.is_log else SHADOW
    for outcome in result.outcomes:
        version = version_by_name[outcome.name]
        if version is None:
            continue
        tags = {"unscored": outcome.why_unscored or "none"}
        if outcome.is_scored:
            tags |= measured_tags(outcome, result) | {"run": run_id}
            tags["verdict"] = verdicts.get(outcome.name, "the baseline of this replay")
        registry.tag_version(version, {f"{prefix}{key}": text for key, text in tags.items()})


def measured_tags(outcome: Outcome, result: ShadowResult) -> dict[str, str]:
    """Return the metrics of one scored candidate of a replay as tags, without a prefix."""
    place = [one.name for one in result.outcomes].index(outcome.name) + 1
    hits = metric_tags(outcome.figures, outcome.ci95, outcome.corrected, outcome.corrected_ci95)
    return hits | {
        "place": f"{place} of {len(result.outcomes)}",
        "source": result.source,
        "queries": str(result.num_queries),
        "documents": str(result.num_documents),
        "bank_rows": str(result.num_rows),
        "bank_sha256": result.bank_sha256,
        "note": outcome.leak or "none",
    }


def _evidence(name: str, decision: Decision, result: ShadowResult, run_id: str) -> dict[str, str]:
    """Return the evidence for a move of the alias as tags that no later replay overwrites."""
    outcome = result.outcome(name)
    assert outcome is not None
    measured = measured_tags(outcome, result) | {"run": run_id}
    reason = decision.reasons[decision.promote.index(name)]
    return {f"{DECIDED}{key}": text for key, text in measured.items()} | {"reason": reason}


def log_figures(
    candidates: Sequence[Candidate], result: ShadowResult, dataset: Dataset | None
) -> None:
    """Log each candidate's figures with its model; the best comes last, so that the run shows it.

    Figures on a query log have their own names, since they are not those of the test split.
    """
    prefix = "shadow_log" if result.is_log else "shadow"
    model_ids = {one.name: one.model_id for one in candidates}
    for outcome in reversed(result.outcomes):
        if outcome.is_scored:
            figures = {f"{prefix}/{outcome.name}/{key}": outcome.figures[key] for key in HITS}
            figures |= hit_metrics(f"{prefix}/", outcome.figures, outcome.ci95)
            figures[f"{prefix}/served_hit_at_5"] = outcome.served["hit_at_5"]
            model_id = model_ids[outcome.name]
            runs.log_metrics(figures, step=1, model_id=model_id, dataset=dataset)


def log_artifacts(
    result: ShadowResult,
    decision: Decision,
    moves: Sequence[Mapping[str, str]],
    is_enabled: bool,
    failure: str | None,
) -> str:
    """Log the report as Markdown and as text, its figures, the per-query table; return the text.

    `moves` are those of the alias before this decision. If the promotion failed afterwards, replace
    the report and the decision.
    """
    head = "" if failure is None else f"**{failure}**\n\n"
    page = shadow_markdown(result, decision, is_enabled, tuple(FIGURES), moves)
    runs.log_artifact(head + page, "report.md")
    runs.describe_run(head + shadow_note(result, decision, is_enabled))
    text = shadow_text(result, decision, is_enabled, failure)
    runs.log_artifact(text + "\n", "shadow.txt")
    runs.log_artifact(decision.report() | {"failure": failure}, "decision.json")
    if failure is None:
        for name, draw in FIGURES.items():
            runs.log_artifact(draw(result), name)
        runs.log_artifact(result.per_query, "per_query.parquet")
    return text
