"""Latent vector models: predict the next text embedding from a long context of them."""

import os

# Idle threads of OpenMP sleep after a short wait. By default they spin for long and take the core
# of any other process; asleep at once, a step of a training takes twice as long (docs/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
