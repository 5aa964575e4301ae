"""Which images stand best for all (herding; Welling, ICML 2009; Rebuffi et al., CVPR 2017, arXiv:1611.07725)."""

from __future__ import annotations

import torch
from torch import Tensor


def herd(features: Tensor, count: int, shifted: bool = False) -> list[int]:
    """The numbers of ``count`` of the unit ``features`` (N, D), no more than N, in the order in which they are chosen:

        j_k = argmin ‖μ - (Σ chosen + f_j) / (k + 1)‖²,    k = 0, 1, …, over those not chosen yet; μ: the mean of all.

    Features being unit, that is argmax f_j·((k + 1)·μ - Σ chosen). ``shifted``: what ZSCL's release stores in place of j_k, its
    place among those that were not chosen before it.
    """
    x = features.double()
    mean, left, found = x.mean(0), torch.ones(len(x), dtype=torch.bool, device=x.device), []
    wanted = mean.clone()  # (k + 1)·μ - Σ chosen
    for _ in range(min(count, len(x))):
        best = int((x @ wanted).masked_fill(~left, -torch.inf).argmax())
        found.append(int(left[:best].sum()) if shifted else best)
        left[best] = False
        wanted += mean - x[best]
    return found
