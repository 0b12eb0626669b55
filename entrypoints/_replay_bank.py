"""The bank of a replay: the one that is given, else that of a version."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lvm.bank.store import Bank
from lvm.models.facts import TRAINED
from lvm.tracking.datasets import DEFAULT_BANK, read_bank
from lvm.tracking.versions import Card


@dataclass(frozen=True)
class Known:
    """The versions that can be read, the oldest first; those named, None where all are meant.

    `baseline` is the version that has the alias.
    """

    versions: Mapping[str, Card]
    named: Sequence[Card] | None
    baseline: str | None

    @property
    def trained(self) -> list[Card]:
        """Return the trained ones of those named, or of all."""
        cards = self.named or self.versions.values()
        return [card for card in cards if card.facts.kind == TRAINED]


def open_replay_bank(path: str | None, known: Known, promote: bool) -> Bank:
    """Open the bank at `path`, or that of a version; print which, with what is left out.

    Raises ValueError where another bank lies there now than the version was made from, or where
    one of several banks would get its first baseline though nobody named it.
    """
    card, role = (None, "") if path is not None else _choose(known)
    bank = read_bank(path or (DEFAULT_BANK if card is None else card.facts.bank))
    foreign = [one for one in known.trained if not is_made_from(one, bank)]
    if card is not None:
        if not is_made_from(card, bank):
            raise ValueError(
                f"bank: {_named([card])}, {role}, was made from another bank than lies at "
                f"{bank.path} now ({card.facts.bank_sha256[:12]}, not {bank.sha256[:12]}); "
                "give bank=<path of the one to replay on>"
            )
        if promote and known.baseline is None and foreign:
            raise ValueError(
                f"bank: none was given, there is no baseline yet, and {_named([card])} is of "
                f"{bank.path}, {_named(foreign)} of other banks; give bank=<path of the one whose "
                "alias it shall be>"
            )
    told = [] if path is not None else [f"bank {bank.path} ({_origin(card, role)})"]
    left_out = [one for one in foreign if one.version != known.baseline]
    if left_out and known.named is None:
        told.append(f"left out, as of other banks: {_named(left_out)}; give bank=<path> for those")
    if told:
        print("; ".join(told), flush=True)
    return bank


def is_made_from(card: Card, bank: Bank) -> bool:
    """Tell whether a predictor was made from this bank, or from one that it extends."""
    return card.facts.bank_sha256 in (bank.sha256, *bank.bases)


def _choose(known: Known) -> tuple[Card | None, str]:
    """Return the version whose bank is taken with its role; None where there is none at all."""
    if known.named:
        return known.named[0], "the first named"
    if known.trained:
        return known.trained[-1], "the newest trained"
    if known.baseline in known.versions:
        return known.versions[known.baseline], "the baseline"
    return next(reversed(known.versions.values()), None), "the newest"


def _origin(card: Card | None, role: str) -> str:
    return "the default" if card is None else f"of {_named([card])}, {role}"


def _named(cards: Sequence[Card]) -> str:
    numbers = ", ".join(card.version or card.reference for card in cards)
    return f"version{'s' if len(cards) > 1 else ''} {numbers}"
