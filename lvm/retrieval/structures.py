"""FAISS structures over the passages of a bank, not yet tuned.

Shapes: N bank rows, K passages, D vector dim, E = D + 1 or more. With a row correction (N, 2)
passages are [scale v; bias; 0 ...], so that their inner product with [q; 1; 0 ...] is the
corrected score.
"""

import math
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch

from lvm.bank.store import Bank
from lvm.retrieval.search import FloatArray, IntArray
from lvm.system.seeding import generator

FLAT, HNSW, IVF = "flat", "hnsw", "ivf"
HNSW_LINKS, HNSW_BUILD_EFFORT = 32, 80
SAMPLE_PER_LIST = 40
KMEANS_STEPS = 10
BLOCK = 16_384


def _flat(bank: Bank, row_K: IntArray, pair_N2: FloatArray | None) -> tuple[Any, int]:
    return _filled(faiss.IndexFlatIP(_augmented_dim(bank)), bank, row_K, pair_N2), 0


def _graph(bank: Bank, row_K: IntArray, pair_N2: FloatArray | None) -> tuple[Any, int]:
    """Malkov, Yashunin, arXiv 1603.09320; one thread, since the order of insertion matters."""
    faiss.omp_set_num_threads(1)
    description = f"HNSW{HNSW_LINKS},SQfp16"
    index = faiss.index_factory(_augmented_dim(bank), description, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = HNSW_BUILD_EFFORT
    index.train(_augmented(bank, row_K[:1], pair_N2))
    return _filled(index, bank, row_K, pair_N2), 0


def _lists(bank: Bank, row_K: IntArray, pair_N2: FloatArray | None) -> tuple[Any, int]:
    faiss.omp_set_num_threads(torch.get_num_threads())
    num_lists = 2 ** round(math.log2(4 * math.sqrt(len(row_K))))
    description = f"IVF{num_lists},SQfp16"
    index = faiss.index_factory(_augmented_dim(bank), description, faiss.METRIC_INNER_PRODUCT)
    index.by_residual = False
    index.cp.niter = KMEANS_STEPS
    num_sampled = min(len(row_K), SAMPLE_PER_LIST * num_lists)
    sample = generator(0, "index sample").choice(row_K, num_sampled, replace=False)
    index.train(_augmented(bank, np.sort(sample), pair_N2))
    return _filled(index, bank, row_K, pair_N2), num_lists


def _filled(index: Any, bank: Bank, row_K: IntArray, pair_N2: FloatArray | None) -> Any:
    for start in range(0, len(row_K), BLOCK):
        index.add(_augmented(bank, row_K[start : start + BLOCK], pair_N2))
    return index


def _augmented(bank: Bank, rows: IntArray, pair_N2: FloatArray | None) -> FloatArray:
    """Return passages [scale v; bias; 0 ...], (b, E)."""
    augmented = np.zeros((len(rows), _augmented_dim(bank)), np.float32)
    augmented[:, : bank.dim] = bank.unit(rows)
    if pair_N2 is not None:
        augmented[:, : bank.dim] *= pair_N2[rows, :1]
        augmented[:, bank.dim] = pair_N2[rows, 1]
    return augmented


def _augmented_dim(bank: Bank) -> int:
    """Return E: the codes are read with vector instructions where it is a multiple of 16."""
    return -(-(bank.dim + 1) // 16) * 16


# Each returns a filled index with its number of lists.
STRUCTURES: dict[str, Callable[[Bank, IntArray, FloatArray | None], tuple[Any, int]]] = {
    FLAT: _flat,
    HNSW: _graph,
    IVF: _lists,
}
