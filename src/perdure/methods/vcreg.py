"""VCReg (Zhu, Evtimova, Chen, Shwartz-Ziv and LeCun, "Variance-Covariance Regularization Improves Representation Learning",
arXiv:2306.13292).

    C = XᵀX/(N - 1)     X: what a block makes of a batch, tokens as N rows of d numbers, centred
    v = 1/d Σ max(0, 1 - √(C_ii + ε)),    c = 1/(d(d - 1)) Σ_{i≠j} C_ij²,    ε = 1e-5
    L = L_task + Σ over blocks (α·v + β·c)

Supervised training keeps only those features that lower its loss; these terms ask every block for variance and for little
correlation, so that what later tasks need survives. With δ > 0 (``vcreg_delta``) C_ij² goes on as 2δ|C_ij| - δ² where
|C_ij| > δ, against outliers.

An option of every method that trains towers (``vcreg=blocks``; ``training/spread.py``): it is added wherever a task's loss is
back-propagated. ``vcreg`` is fine-tuning with it switched on.

No release of the authors was found: this is the definition, its gradient exact. A public port inserts a covariance gradient
that is N - 1 times this one, as a division is left out there: who takes a β from it, trains with β·(N - 1) here. Its 0.16 and
0.01 are an example, not the paper's, which tunes both by architecture. It was made for pre-training; nobody has shown what it
does to a CLIP that is fine-tuned on one task after another.
"""

from __future__ import annotations

from perdure.methods.base import METHODS, Row

METHODS.add(
    "vcreg", Row(learn=("finetune", {"vcreg": "blocks"})),
    "Fine-tuning whose blocks are held to variance and little correlation.", paper="arXiv:2306.13292",
)  # fmt: skip
