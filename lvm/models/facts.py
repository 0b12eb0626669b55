"""Facts of a predictor: kind, sizes, and the bank and windows it was made from."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reading facts must load neither numpy nor torch
    from lvm.bank.bank import Bank
    from lvm.windows.planning import Windows

FREE, TRAINED = "free", "trained"
# Models of an earlier FIT_VERSION were logged with a hubness correction that counts own documents.
OMITTED_SINCE = 2
OWN_COUNTED = "its hubness correction counts predictions of a row's own document"


@dataclass(frozen=True)
class Facts:
    """Facts of one predictor; `bank` is the path of its bank, `seed` the seed of the split.

    `fit_version` is the FIT_VERSION of a free predictor's fit and of each hubness correction,
    `recipe` the recipe of a trained predictor, `encoder` what made the vectors of its bank ("" in
    facts that were recorded before). `init_banks` are the banks that it was trained on before, as
    `lvm.windows.origins` writes them; `init_twins` counts the val and test rows of its own bank
    that have a twin among their train rows.
    """

    model: str
    kind: str
    phase: str
    dim: int
    ctx: int
    bank: str
    bank_sha256: str
    windows_sha256: str
    split: str
    seed: int
    leaky: bool
    fit_version: int = 0
    recipe: str = "none"
    encoder: str = ""
    init_banks: str = ""
    init_twins: int = 0

    def __post_init__(self) -> None:
        for one in fields(self):
            value, kind = getattr(self, one.name), one.type
            if type(value) is not kind:
                raise ValueError(f"{one.name}: {value!r} is no {getattr(kind, '__name__', kind)}")
        if self.dim < 1 or self.ctx < 1:
            raise ValueError(f"dim, ctx: {self.dim}, {self.ctx} must be 1 or more")


def omits_own_document(fit_version: int) -> bool:
    """Tell whether the hubness correction of this FIT_VERSION leaves own documents out."""
    return fit_version >= OMITTED_SINCE


def facts_of(
    name: str, phase: str, bank: "Bank", windows: "Windows", recipe: str = "none"
) -> Facts:
    """Return the facts of the predictor `name` made from the train rows of `windows`."""
    from lvm.models.table import FREE_MODELS
    from lvm.models.weights import FIT_VERSION

    return Facts(
        model=name,
        kind=FREE if name in FREE_MODELS else TRAINED,
        phase=phase,
        dim=bank.dim,
        ctx=windows.ctx,
        bank=str(bank.path.resolve()),
        bank_sha256=bank.sha256,
        windows_sha256=windows.sha256,
        split=windows.split,
        seed=windows.seed,
        leaky=windows.leaky,
        fit_version=FIT_VERSION,
        recipe=recipe,
        encoder=bank.encoder,
    )


def facts_from_tags(tags: Mapping[str, str]) -> Facts:
    """Parse facts from the strings of `tags`; fields with a default may be missing.

    Raises KeyError or ValueError for missing or wrong values.
    """
    kinds: dict[Any, Any] = {int: int, bool: _bool, str: str}
    needed = [f for f in fields(Facts) if f.default is MISSING or f.name in tags]
    return Facts(**{f.name: kinds[f.type](tags[f.name]) for f in needed})


def _bool(text: str) -> bool:
    return {"True": True, "False": False}[text]
