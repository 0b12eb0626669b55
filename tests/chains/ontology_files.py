"""Small ontologies on disk: WordNet databases, OBO files, edge lists."""

from collections.abc import Mapping
from pathlib import Path

ANIMAL, PLANT = 5, 20  # numbers of the lexicographer files noun.animal, noun.plant
COLOURS = "red blue green brown black white grey golden silver striped spotted dwarf".split()
KINGDOMS = {
    "animal": (ANIMAL, ["horse", "dog", "bird"], "a creature that runs on the farm with {}"),
    "plant": (PLANT, ["tree", "grass", "flower"], "a growth rooted in the forest soil, {}"),
}


def kingdoms() -> tuple[dict[str, str], dict[str, tuple[str, int]]]:
    """Return the parent of each concept, its gloss with its lexicographer file.

    thing > animal > horse > red_horse: 2 kingdoms of 3 groups of 12 kinds.
    """
    parents: dict[str, str] = {}
    known: dict[str, tuple[str, int]] = {"thing": ("whatever exists at all", 3)}
    for kingdom, (lane, groups, gloss) in KINGDOMS.items():
        parents[kingdom] = "thing"
        known[kingdom] = (gloss.format("life"), lane)
        for group in groups:
            parents[group] = kingdom
            known[group] = (gloss.format(group), lane)
            for colour in COLOURS:
                name = f"{colour}_{group}"
                parents[name] = group
                known[name] = (gloss.format(f"{colour} {group} parts"), lane)
    return parents, known


def write_wordnet(
    folder: Path, parents: Mapping[str, str], known: Mapping[str, tuple[str, int]]
) -> Path:
    """Write data.noun with index.noun; offsets are positions in bytes, as the format asks."""
    folder.mkdir(parents=True)
    header = "  1 A small database in the format of WordNet 3.0.\n"
    children = {name: [one for one, above in parents.items() if above == name] for name in known}

    def line(name: str, offsets: Mapping[str, int]) -> str:
        up = [f"@ {offsets[parents[name]]:08d} n 0000"] if name in parents else []
        down = [f"~ {offsets[child]:08d} n 0000" for child in children[name]]
        gloss, lane = known[name]
        pointers = " ".join([f"{len(up + down):03d}", *up, *down])
        return f'{offsets[name]:08d} {lane:02d} n 01 {name} 0 {pointers} | {gloss}; "a use"  \n'

    offsets = dict.fromkeys(known, 0)
    place = len(header)
    sizes = {name: len(line(name, offsets).encode()) for name in known}
    for name in known:
        offsets[name] = place
        place += sizes[name]
    (folder / "data.noun").write_text(header + "".join(line(name, offsets) for name in known))
    index = "".join(f"{name} n 1 1 @ 1 0 {offsets[name]:08d}  \n" for name in sorted(known))
    (folder / "index.noun").write_text(header + index)
    return folder


def write_obo(path: Path, parents: Mapping[str, str], known: Mapping[str, tuple[str, int]]) -> Path:
    """Write [Term]s with is_a; identifiers are X:<name>, namespaces by lexicographer file."""
    terms = ["format-version: 1.2\nontology: kingdoms\n"]
    for name, (gloss, lane) in known.items():
        lines = ["[Term]", f"id: X:{name}", f"name: {name.replace('_', ' ')}"]
        lines += [f"namespace: lane_{lane}", f'def: "{gloss}" [SELF:1]']
        lines += [f"is_a: X:{parents[name]} ! above"] if name in parents else []
        terms.append("\n".join(lines) + "\n")
    path.write_text("\n".join(terms))
    return path


def write_edges(
    path: Path, parents: Mapping[str, str], known: Mapping[str, tuple[str, int]]
) -> Path:
    """Write parent,child with the texts beside it."""
    lines = [f"{parent},{child}" for child, parent in parents.items()]
    path.write_text("\n".join(["parent,child", *lines]) + "\n")
    nodes = [f'{name},"{name}: {gloss}",lane_{lane}' for name, (gloss, lane) in known.items()]
    beside = path.with_name(f"{path.stem}.nodes.csv")
    beside.write_text("\n".join(["node,text,lane", *nodes]) + "\n")
    return path
