"""Warnings of a training run, told as soon as they are known."""

from lvm.tracking import runs as tracking


class Doubts:
    """Prints each warning once, keeps the tag `warnings` of the run at all that stand now."""

    def __init__(self, lasting: list[str]) -> None:
        self.lasting = lasting
        self._told: set[str] = set()

    def tell(self, sentences: list[str]) -> list[str]:
        """Tell the lasting ones with `sentences`; return all."""
        standing = [*self.lasting, *sentences]
        for sentence in standing:
            if sentence not in self._told:
                print(f"warning: {sentence}", flush=True)
        self._told |= set(standing)
        tracking.set_tags({"warnings": "; ".join(standing) or "none"})
        return standing
