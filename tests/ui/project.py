"""A tiny project with every kind of run: three trainings, measured, replayed, promoted; a study."""

from pathlib import Path

from entrypoints import eval as eval_command
from entrypoints import lane_diagnostics, shadow_eval, train, tune
from tests.synthetic import make_bank

TINY_MODEL = "--model memory_gru --hidden 8 --layers 2 --chunk 5 --slots 2".split()
SHORT = "--bank bank --negatives 32 --epochs 3".split()


def make_project(folder: Path) -> None:
    """Run the entry points on a bank of 4,800 rows, in the working folder `folder`."""
    make_bank(folder / "bank", num_sequences=8, num_documents=30, num_twins=40)
    for phase, ctx in (("2B", "10"), ("3.5", "20")):
        assert train.main([*SHORT, "--ctx", ctx, "--phase", phase, *TINY_MODEL]) == 0
    assert train.main([*SHORT, "--ctx", "20", *TINY_MODEL]) == 0
    assert eval_command.main(["--model", "models:/lvm/2"]) == 0
    assert lane_diagnostics.main(["--model", "models:/lvm/2"]) == 0
    assert shadow_eval.main(["--bank", "bank", "--promote", "enabled"]) == 0
    (folder / "space.yaml").write_text("lr: {low: 0.0001, high: 0.05, log: true}\n")
    study = "--ctx 20 --model res_mlp --batch-size 8 --trials 4 --space space.yaml".split()
    assert tune.main([*SHORT, *study]) == 0
