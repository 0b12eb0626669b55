"""Warnings of several trainings, each kind on one line."""

import re
from collections.abc import Mapping, Sequence

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def merged_warnings(told: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line for each kind of sentence, with the names of those that were told it.

    Sentences of a kind differ by their numbers alone; such a number stands as its lowest to its
    highest: `1, 2: only 24 to 252 optimiser steps are planned`.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, sentences in told.items():
        for sentence in sentences:
            kinds.setdefault(NUMBER.sub("#", sentence), []).append((name, sentence))
    return [
        f"{', '.join(dict.fromkeys(name for name, _ in found))}: {_merged([s for _, s in found])}"
        for found in kinds.values()
    ]


def _merged(sentences: Sequence[str]) -> str:
    """Return the first sentence with the range of each number that is not the same in all."""
    columns = iter(zip(*(NUMBER.findall(sentence) for sentence in sentences), strict=True))

    def span(_: re.Match[str]) -> str:
        numbers = next(columns)
        low, high = min(numbers, key=_value), max(numbers, key=_value)
        return low if low == high else f"{low} to {high}"

    return NUMBER.sub(span, sentences[0])


def _value(number: str) -> float:
    return float(number.replace(",", ""))
