"""The thresholds file with everything that can be wrong in it."""

from pathlib import Path

import pytest

from lvm.system.settings import GATES_FILE, read_gate_rules, read_lane_rules, read_scaling_rules


def test_the_shipped_file_is_read() -> None:
    assert 0 < read_gate_rules().alpha < 1
    assert read_lane_rules().min_chains == 300
    assert 0 < read_scaling_rules().saturated_gain < read_scaling_rules().both_gain


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  alpha: 0.05", "  alpa: 0.05", "misses or does not know alpa, alpha"),
        ("  alpha: 0.05", "  alpha: high", "promotion.alpha is 'high'; it must be a valid number"),
        ("  alpha: 0.05", "  alpha: .nan", "promotion.alpha is nan"),
        ("  alpha: 0.05", "  alpha: -1", "promotion.alpha is -1"),
        ("  min_queries: 200", "  min_queries: 0.5", "it must be a valid integer"),
        ("  min_queries: 200", "  min_queries: true", "it must be a valid integer"),
        ("promotion:", "promotions:", "no section 'promotion'"),
        ("promotion:", "promotion: [", "not a readable YAML file"),
        ("  alpha: 0.05", "  alpha: 1" + "0" * 400, "promotion.alpha is 1000"),
        ("  alpha: 0.05", "  alpha: 0.05\n  alpha: 0.5", "'alpha' appears twice"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text(GATES_FILE.read_text().replace(old, new))
    with pytest.raises(ValueError) as caught:
        read_gate_rules(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a readable YAML file"):
        read_lane_rules(tmp_path / "none.yaml")
