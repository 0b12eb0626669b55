"""Tests of the encoders that need no download."""

import logging
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from lvm.corpus.encoders import Encoder, load_encoder


@pytest.fixture(scope="module")
def wordllama() -> Encoder:
    return load_encoder("wordllama")


def test_rows_are_unit_vectors(wordllama: Encoder) -> None:
    unit_ND = wordllama.encode(["The cat sat on the mat.", "A mitochondrion makes energy."])
    assert unit_ND.shape == (2, wordllama.dim) == (2, 256) and unit_ND.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(unit_ND, axis=1), 1, atol=1e-6)


def test_nearness_follows_meaning(wordllama: Encoder) -> None:
    query, near, far = wordllama.encode(
        ["The dog barked all night.", "A puppy was barking.", "Interest rates rose sharply."]
    )
    assert query @ near > query @ far + 0.1


def test_text_without_tokens_stays_a_zero_row(wordllama: Encoder) -> None:
    unit_ND = wordllama.encode(["", "word"])
    assert not unit_ND[0].any() and unit_ND[1].any()


def test_vector_does_not_depend_on_the_batch(wordllama: Encoder) -> None:
    texts = [f"Sentence {n} " + "goes on and on " * (n % 40) for n in range(600)]
    together = wordllama.encode(texts)
    for row in (0, 39, 299, 599):
        np.testing.assert_array_equal(wordllama.encode([texts[row]])[0], together[row])


def test_no_texts_give_no_rows(wordllama: Encoder) -> None:
    assert wordllama.encode([]).shape == (0, 256)


@pytest.mark.slow
def test_loading_leaves_the_root_logger_alone() -> None:
    code = (
        "import logging; from lvm.corpus.encoders import load_encoder; load_encoder('wordllama'); "
        "root = logging.getLogger(); assert not root.handlers and root.level == logging.WARNING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert logging.getLogger().level == logging.WARNING


def test_what_a_hub_logs_on_the_way_to_a_refusal_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(name: str, **options: bool) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no network")

    found = types.SimpleNamespace(SentenceTransformer=unreachable)
    monkeypatch.setitem(sys.modules, "sentence_transformers", found)
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(ValueError, match="encoder 'banana': cannot be loaded"):
        load_encoder("banana")
    assert caplog.records == [] and logging.getLogger("huggingface_hub").level == before


@pytest.mark.slow
def test_unknown_encoder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder .*nowhere.*wordllama") as caught:
        load_encoder(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
