"""Roles of different papers played together: who learns, who fuses, who answers.

gift+condu           experts taught with GIFT's replay, unified by ConDU
gift+mg_clip         GIFT, and MG-CLIP's head on the image features it leaves
condu+mg_clip        ConDU, and MG-CLIP's head on the pre-trained features, which never change
gift+condu+mg_clip   all three
finetune+ridge       sequential fine-tuning, and a ridge head on the pre-trained features
condu+ridge          ConDU's experts, and a ridge head on the pre-trained features
finetune+slca        sequential fine-tuning, and SLCA's aligned heads on the image features it leaves
ridge_patches        the ridge head alone, wide, and on patches too
"""

from __future__ import annotations

from perdure.methods.base import METHODS, Row

METHODS.add(
    "gift+condu", Row(learn=("gift", {}), fuse=("condu", {})), "GIFT's replay teaches experts, ConDU unifies them."
)
METHODS.add(
    "gift+mg_clip", Row(learn=("gift", {}), answer=("mg_clip", {})), "GIFT, with MG-CLIP's head on its image features."
)
METHODS.add(
    "condu+mg_clip", Row(learn=("finetune", {}), fuse=("condu", {}), answer=("mg_clip", {})),
    "ConDU, with MG-CLIP's head on the pre-trained image features.",
)  # fmt: skip
METHODS.add(
    "gift+condu+mg_clip", Row(learn=("gift", {}), fuse=("condu", {}), answer=("mg_clip", {})),
    "GIFT's replay, ConDU's fusion, MG-CLIP's head.",
)  # fmt: skip
METHODS.add(
    "finetune+ridge", Row(learn=("finetune", {}), answer=("ridge", {})),
    "Sequential fine-tuning, with a ridge head on the pre-trained image features.",
)  # fmt: skip
METHODS.add(
    "condu+ridge", Row(learn=("finetune", {}), fuse=("condu", {}), answer=("ridge", {})),
    "ConDU's experts, with a ridge head on the pre-trained image features.",
)  # fmt: skip
METHODS.add(
    "finetune+slca", Row(learn=("finetune", {}), answer=("slca", {})),
    "Sequential fine-tuning, with SLCA's aligned heads on its image features.",
)  # fmt: skip
METHODS.add(
    "ridge_patches", Row(learn=("ridge", {"input": "patches", "features": 4096, "judge": 1024})),
    "A wide ridge head that reads the patches of an earlier block too: what perdure recommends.", paper="arXiv:2406.18868",
)  # fmt: skip
