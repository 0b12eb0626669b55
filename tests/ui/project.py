"""A tiny project whose runs are all there: two contexts trained, measured, replayed, promoted."""

from pathlib import Path

from entrypoints import eval as eval_command
from entrypoints import lane_diagnostics, shadow_eval, train
from tests.synthetic import make_bank

TINY_MODEL = "--model memory_gru --hidden 8 --layers 2 --chunk 5 --slots 2".split()
TINY_MODEL += "--negatives 32 --epochs 3".split()


def make_project(folder: Path) -> None:
    """Run the entry points on a bank of 4,800 rows, in the working folder `folder`."""
    make_bank(folder / "bank", num_sequences=8, num_documents=30, num_twins=40)
    for phase, ctx in (("2B", "10"), ("3.5", "20")):
        named = ["--bank", "bank", "--ctx", ctx, "--phase", phase]
        assert train.main([*named, *TINY_MODEL]) == 0
    assert eval_command.main(["--model", "models:/lvm/2"]) == 0
    assert lane_diagnostics.main(["--model", "models:/lvm/2"]) == 0
    assert shadow_eval.main(["--bank", "bank", "--promote", "enabled"]) == 0
