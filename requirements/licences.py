"""Writes the licences of locked packages into docs/dependencies.md, as pip-licenses finds them."""

import json
import re
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
LOCK, PAGE = ROOT / "requirements" / "test.lock", ROOT / "docs" / "dependencies.md"
APART = {"torch"}  # installed before the lock, in the build for the machine
COPYLEFT = re.compile(r"GPL|General Public|MPL|Mozilla|EPL|Eclipse|CDDL|EUPL|Artistic", re.I)
# Missing in the metadata, read in the LICENSE files.
READ = {"huey": "MIT (its LICENSE file)", "skops": "MIT (its LICENSE file)"}
UNKNOWN = "UNKNOWN"
BEGIN, END = "<!-- make licences: begin -->", "<!-- make licences: end -->"


def locked(text: str) -> dict[str, str]:
    """Return the version of each package in a lock, by normalised name."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", text, re.M)
    return {normalised(name): version for name, version in pins}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_licences() -> dict[str, str]:
    """Return the licence of each installed package, by normalised name."""
    command = [sys.executable, "-m", "piplicenses", "--format=json", "--with-system"]
    command.append("--from=mixed")
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    licences = {normalised(one["Name"]): " ".join(one["License"].split())[:90] for one in found}
    return licences | {name: one for name, one in READ.items() if licences.get(name) == UNKNOWN}


def main() -> int:
    """Write the table into the page; fail if a locked package is missing or has no licence."""
    names, licences = locked(LOCK.read_text()), installed_licences()
    absent = sorted(set(names) - set(licences))
    if absent:
        print(f"error: not installed: {', '.join(absent)}; run make .venv/.installed-audit")
        return 2
    unknown = sorted(name for name in names if licences[name] == UNKNOWN)
    if unknown:
        print(f"error: no licence in the metadata of {', '.join(unknown)}; add it to READ")
        return 2
    rows = [
        (name, names.get(name, "2.13.0"), licences[name], "yes" if copyleft(licences[name]) else "")
        for name in sorted({*names, *APART})
    ]
    table = tabulate(
        rows, ["package", "version", "licence", "copyleft"], "github", disable_numparse=True
    )
    before, after = PAGE.read_text().split(BEGIN)[0], PAGE.read_text().split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    return 0


def copyleft(licence: str) -> bool:
    """Tell whether a licence requires sharing the source of changes or of larger works."""
    return bool(COPYLEFT.search(licence))


if __name__ == "__main__":
    sys.exit(main())
