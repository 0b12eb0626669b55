"""A python with nothing but what a model's requirements name: what the process may import.

`python alone.py <requirements.txt> <script> <words>` runs a script so; lvm itself is not installed.
"""

import runpy
import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(lines: list[str]) -> set[str]:
    """Return the distributions that the lines name, and all that these require."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in lines]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        is_wanted = one.marker is None or any(
            one.marker.evaluate({"extra": x}) for x in ("", *one.extras)
        )
        if is_wanted and name not in found:
            found.add(name)
            try:
                waiting += map(Requirement, requires(name) or [])
            except PackageNotFoundError:
                continue
    return found


class Refuse(MetaPathFinder):
    """Finds no module of a distribution that is not `needed`."""

    def __init__(self, distributions: set[str]) -> None:
        known = packages_distributions()
        self.refused = {
            top
            for top, names in known.items()
            if top != "lvm" and not {canonicalize_name(name) for name in names} & distributions
        }

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.refused:
            raise ModuleNotFoundError(f"No module named {name!r} among the requirements", name=name)


if __name__ == "__main__":
    listed, script, *words = sys.argv[1:]
    with open(listed) as opened:
        distributions = needed(opened.read().split())
    sys.meta_path = [one for one in sys.meta_path if "editable" not in repr(one).lower()]
    sys.meta_path.insert(0, Refuse(distributions))
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
