"""The benchmarks run at sizes that take seconds; their figures are not checked here."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.rivals import CALIBRATION, RECIPES, Rival, gbce
from lvm.bank.bank import open_bank
from lvm.bank.duplicates import duplicate_groups
from lvm.models.baselines import CopyLast, MovingAverage
from lvm.models.predict import predict_queries
from lvm.retrieval.exact import exact_ranks
from lvm.windows.export import plan_windows

pytestmark = [pytest.mark.slow, pytest.mark.battery]

ROOT = Path(__file__).parents[1]


def printed(name: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ranking_is_measured_beside_the_matrix_product_and_faiss(tmp_path):
    sizes = "--rows 3000 --dim 32 --queries 300 --faiss-queries 100 --threads 1".split()
    table = printed("ranking", *sizes, "--scratch", str(tmp_path), folder=tmp_path)
    *rows, last = table.splitlines()[2:]
    lines = {line[:12].strip(): line[12:].split() for line in rows}
    bf16 = {"bf16 ranks"} & set(lines)
    assert set(lines) == {"matmul", "exact_ranks", "fp32 ranks", "faiss flat"} | bf16
    assert lines["exact_ranks"][0] == "300" and lines["faiss flat"][0] == "100"
    assert last == "equal ranks"
    assert lines["matmul"][3] == "100%"
    assert all(cells[-1] == "MB" for cells in lines.values())
    assert not list(tmp_path.iterdir()), "the scratch bank is gone"


def test_streaming_is_measured_for_every_predictor(tmp_path):
    table = printed("streaming", *"--dim 16 --ctx 20 --rows 30".split(), folder=tmp_path)
    names = {line[:20].strip() for line in table.splitlines()[2:]}
    assert names == {
        "delta_memory",
        "memory_gru gru",
        "memory_gru mingru",
        "transformer",
        "ema",
        "ridge",
    }


def test_serving_is_measured_with_its_index(tmp_path, tiny_bank):
    sizes = "--ctx 20 --rows 30 --threads 1".split()
    table = printed("serving", "--bank", str(tiny_bank.path), *sizes, folder=tmp_path)
    assert "ema: exhaustive search" in table and "memory_gru: exhaustive search" in table
    assert table.count("warm_p95") == 2


def test_http_is_measured_beside_the_same_process(tmp_path, tiny_bank):
    sizes = "--ctx 20 --requests 2".split()
    table = printed("http", "--bank", str(tiny_bank.path), *sizes, folder=tmp_path)
    rows = {line[:14].strip(): line[14:].split() for line in table.splitlines()[-3:]}
    assert list(rows) == ["in process", "HTTP, lists", "HTTP, packed"]
    assert rows["HTTP, lists"][4] != "0"


def test_training_is_measured_beside_an_unrolled_gru_and_the_matrix_product(tmp_path):
    table = printed("training", *"--ctx 40 --batch 1 --dim 16 --repeats 1".split(), folder=tmp_path)
    rows = [line.split("  ") for line in table.splitlines()[4:16]]
    names = (
        "nn.GRU, 4 layers, unrolled",
        "memory_gru, cell=gru",
        "memory_gru, cell=mingru",
        "delta_memory",
        "delta_memory, loss, AdamW",
        "matmul",
    )
    assert [row[0] for row in rows] == [name for name in names for _ in range(2)]
    assert [[cell.strip() for cell in row if cell][1] for row in rows] == 6 * ["fp32", "bf16"]
    assert "default precision here (precision=auto): " in table


def test_trials_are_compared_with_the_moving_average(tmp_path, tiny_bank):
    toy = "hidden=8,layers=2,epochs=1,precision=fp32,negatives=32"
    words = ["--bank", str(tiny_bank.path), "--ctx", "20", toy, f"{toy},model=res_mlp"]
    lines = printed("trials", *words, folder=tmp_path).splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["ema", toy, f"{toy},model=res_mlp"]
    assert lines[-3].split()[5:8] == ["+0.0", "[+0.0,", "+0.0]"]


def test_an_independent_computation_finds_the_same_figures(tmp_path, tiny_bank):
    """The bank has exact twins, so that groups count."""
    plan = plan_windows(tiny_bank, 20)
    queries = plan.queries["test"]
    models = {"copy-last": CopyLast(tiny_bank.dim), "ema": MovingAverage(tiny_bank.dim, 0.5)}
    tables = []
    for name, model in models.items():
        (found,) = exact_ranks(
            predict_queries(model, tiny_bank, queries), queries, tiny_bank, plan.representative_N
        )
        columns = {"predictor": name, "target_row": queries.target_row_Q, "rank": found.rank_Q}
        tables.append(pd.DataFrame(columns))
    pd.concat(tables).to_parquet(tmp_path / "measured.parquet")
    words = ["--bank", str(tiny_bank.path), "--measured", str(tmp_path / "measured.parquet")]
    lines = printed("independent", *words, "--ctx", "20", folder=tmp_path).splitlines()[3:]
    cells = [line.split()[2:] for line in lines]
    assert cells[0] == cells[1] and cells[2] == cells[3]
    assert cells[0] != cells[2]


def test_hubness_is_measured_by_both_definitions(tmp_path, tiny_bank):
    words = "--ctx 20 --queries 50 --predictors copy-last,ema".split()
    table = printed("hubness", "--bank", str(tiny_bank.path), *words, folder=tmp_path)
    rows = [line.split("  ") for line in table.splitlines()[3:]]
    cells = [[cell.strip() for cell in row if cell][:2] for row in rows]
    ways = ("plain", "own documents counted", "own documents left out")
    assert cells == [[name, way] for name in ("copy-last", "ema") for way in ways]


def test_choices_on_samples_stand_beside_those_on_all_queries(tmp_path, tiny_bank):
    words = ["--bank", str(tiny_bank.path), "--ctx", "20", "--queries", "60"]
    rows = [line.split("  ") for line in printed("choices", *words, folder=tmp_path).splitlines()]
    cells = [[cell.strip() for cell in row if cell] for row in rows[3:]]
    names = ["decay of ema", "beta, ema", "penalty of ridge", "beta, ridge"]
    assert [row[0] for row in cells] == names
    assert all(row[1] == "60" and row[-1] == "+0.00" for row in cells)


def test_verdicts_are_set_beside_the_truth(tmp_path):
    words = "--seeds 1 --truths unoptimised --steps 4".split()
    words += ["--keep", str(tmp_path / "kept")]
    first = printed("verdicts", *words, folder=tmp_path).splitlines()
    rows = [line.split() for line in first]
    assert ["unoptimised", "0", "not", "optimised", "right"] in [row[:5] for row in rows]
    assert rows[-1] == ["unoptimised", "1", "0", "0"], "right, open, wrong"
    cells = list(tmp_path.glob("kept/unoptimised-0/cells/*.safetensors"))
    written = [path.stat().st_mtime_ns for path in cells]
    again = printed("verdicts", *words, folder=tmp_path).splitlines()
    assert again[0] == first[0], "the sentence of the verdict"
    assert len(cells) == 4 and written == [path.stat().st_mtime_ns for path in cells]


def test_a_large_bank_has_the_structure_of_text(tmp_path):
    printed("text_bank", "bank", "--rows", "3000", "--dim", "48", folder=tmp_path)
    bank = open_bank(tmp_path / "bank")
    assert (bank.num_rows, bank.dim, len(bank.documents)) == (3000, 48, 30)
    unit_ND = bank.unit(slice(None))
    near = np.einsum("nd,nd->n", unit_ND[1:], unit_ND[:-1]).mean()
    far = np.einsum("nd,nd->n", unit_ND[1500:], unit_ND[:1500]).mean()
    assert near > far + 0.2, "rows resemble their neighbours"
    twins = 3000 - len(np.unique(duplicate_groups(bank)))
    assert 50 < twins < 400, "set phrases come again"


def test_results_are_one_table_that_resumes(tmp_path, tiny_bank):
    words = ["--bank", str(tiny_bank.path), "--ctx", "20", "--queries", "40", "--epochs", "2"]
    few = ["--seeds", "0", "--models", "ema,skip,gru4rec,lcm,sasrec"]
    first = printed("results", *words, *few, folder=tmp_path).splitlines()
    measured = [line.split(":")[0] for line in first if " min, corrected " in line]
    assert measured == [f"{name} seed 0" for name in few[-1].split(",")]
    more = ["--seeds", "0,1", "--models", "copy-last,ema,skip,gsasrec,gru4rec"]
    lines = printed("results", *words, *more, folder=tmp_path).splitlines()
    measured = [line.split(":")[0] for line in lines if " min, corrected " in line]
    ours = [f"{name} seed 1" for name in ("skip", "gsasrec", "gru4rec")]
    assert measured == ["copy-last seed 0", "gsasrec seed 0", *ours], "the others are cached"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[0] == "|"]
    named = [row for row in rows[2:] if row[0]]
    assert [row[0] for row in named] == more[-1].split(",")
    assert [row[1] for row in named] == ["1", "1", "2", "2", "2"]
    assert named[3][4].count(" of 2") == 2, "two seeds"
    orders = [row[5] for row in rows[2:]]
    assert orders[:2] == ["plain", "corrected"] and len(orders) % len(named) == 0
    assert all(row[-1] for row in named if row[0] != "ema") and not named[1][-1]


@pytest.mark.parametrize("name", RECIPES)
def test_a_rival_reads_no_later_row(name):
    torch.manual_seed(0)
    rival = Rival(name, 16).eval()
    context_1TD = torch.nn.functional.normalize(torch.randn(1, 9, 16), dim=-1)
    changed_1TD = context_1TD.clone()
    changed_1TD[:, 6:] = -changed_1TD[:, 6:]
    before, after = rival(context_1TD), rival(changed_1TD)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])
    torch.testing.assert_close(before.norm(dim=-1), torch.ones(1, 9))


def test_gbce_is_that_of_its_paper():
    torch.manual_seed(0)
    true_logit_P, logit_PK = torch.randn(7), torch.randn(7, 5)
    rate = 5 / 99
    beta = rate * (CALIBRATION * (1 - 1 / rate) + 1 / rate)
    share_P = torch.sigmoid(true_logit_P) ** beta
    others_P = (1 - torch.sigmoid(logit_PK)).log().sum(dim=1)
    torch.testing.assert_close(
        gbce(true_logit_P, logit_PK, 100), -(share_P.log() + others_P).mean()
    )


def test_a_feature_that_never_varies_is_no_division_by_zero():
    torch.manual_seed(0)
    unit_ND = torch.nn.functional.normalize(torch.randn(50, 16), dim=-1)
    unit_ND[:, 3] = 0
    rival = Rival("lcm", 16)
    rival.measure(unit_ND)
    assert rival.standard(unit_ND).isfinite().all() and rival(unit_ND[None]).isfinite().all()
