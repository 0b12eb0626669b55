"""Independent random generators, each derived from one seed and a name."""

import zlib

import numpy as np


def generator(seed: int, name: str) -> np.random.Generator:
    """Return a numpy generator; the same (seed, name) gives the same stream.

    Streams of different names are statistically independent (numpy's SeedSequence, spawn keys).
    """
    return np.random.default_rng(_sequence(seed, name))


def torch_seed(seed: int, name: str) -> int:
    """Return a 63-bit integer seed for a torch generator."""
    return int(_sequence(seed, name).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sequence(seed: int, name: str) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),))
