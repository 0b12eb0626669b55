"""The gated delta rule: an associative memory that is trained by the sequence it reads.

Shapes: B batch, T time, A heads, R key features, V value features, C blocks, S steps of a block.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64


def delta_rule(
    query_BTAR: Tensor,
    key_BTAR: Tensor,
    value_BTAV: Tensor,
    strength_BTA: Tensor,
    log_keep_BTA: Tensor,
    state_BAVR: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what each step reads (B, T, A, V) and the memory after the last one (B, A, V, R).

    M_t = a_t M_{t-1} + b_t (v_t - a_t M_{t-1} k_t) k_t^T, read_t = M_t q_t, with b `strength` in
    0 ... 1 and a = exp(`log_keep`) in 0 ... 1: one step of gradient descent on |M k_t - v_t|^2 / 2
    (Yang, Kautz, Hatamizadeh, arXiv 2412.06464, section 3). Keys must have length 1 or less. The
    memory starts as `state_BAVR`, else as zero. Blocks of 64 steps are solved in parallel as one
    triangular system each (Yang et al., arXiv 2406.06484, section 3.2). The memory is float32
    under autocast, too, which takes the products in its own dtype.
    """
    num_steps = query_BTAR.shape[1]
    query, key, value, strength, log_keep = (
        _blocks(part) for part in (query_BTAR, key_BTAR, value_BTAV, strength_BTA, log_keep_BTA)
    )
    log_decay_BACS = log_keep.cumsum(dim=-1)
    ratio = (log_decay_BACS[..., :, None] - log_decay_BACS[..., None, :]).tril()
    decay_BACSS = ratio.exp().tril()
    grown_BACS = log_decay_BACS.exp()
    overlap = (key @ key.mT) * decay_BACSS.tril(-1) * strength[..., None]
    wanted = torch.cat([value, key * grown_BACS[..., None]], dim=-1) * strength[..., None]
    solved = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
    new_BACSV, old_BACSR = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    score_BACSS = (query @ key.mT) * decay_BACSS
    query = query * grown_BACS[..., None]
    key = key * (log_decay_BACS[..., -1:] - log_decay_BACS).exp()[..., None]
    batch, heads = query.shape[:2]
    if state_BAVR is None:
        state_BAVR = query.new_zeros(batch, heads, value.shape[-1], query.shape[-1])
    reads = []
    # Unbound at once: the gradient of a slice fills a tensor as large as all blocks.
    parts = (query, key, score_BACSS, new_BACSV, old_BACSR, grown_BACS[..., -1, None, None])
    for query_, key_, score, new, old, kept in zip(*(p.unbind(2) for p in parts), strict=True):
        change_BASV = new - old @ state_BAVR.mT
        reads.append(query_ @ state_BAVR.mT + score @ change_BASV)
        state_BAVR = kept * state_BAVR + change_BASV.mT @ key_
    read_BACSV = torch.stack(reads, dim=2)
    return read_BACSV.flatten(2, 3).transpose(1, 2)[:, :num_steps], state_BAVR


def delta_step(
    query_AR: Tensor,
    key_AR: Tensor,
    value_AV: Tensor,
    strength_A: Tensor,
    log_keep_A: Tensor,
    state_AVR: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return what one more step reads (A, V) and the memory after it."""
    kept_AVR = state_AVR * log_keep_A.exp()[:, None, None]
    missed_AV = value_AV - (kept_AVR @ key_AR[:, :, None])[..., 0]
    state_AVR = torch.baddbmm(
        kept_AVR, (strength_A[:, None] * missed_AV)[:, :, None], key_AR[:, None]
    )
    return (state_AVR @ query_AR[:, :, None])[..., 0], state_AVR


def _blocks(part_BTAX: Tensor) -> Tensor:
    """Cut (B, T, A, ...) into (B, A, C, S, ...), float32; steps added at the end change nothing."""
    part_BTAX = part_BTAX.float()
    added = [0, 0] * (part_BTAX.ndim - 2) + [0, -part_BTAX.shape[1] % BLOCK]
    return pad(part_BTAX, added).unflatten(1, (-1, BLOCK)).movedim(3, 1)
