"""Experience replay (Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019, arXiv:1902.10486).

    L = CE over all classes learned so far, on the task's images of a step and as many of the memory as ``replayed`` says

The memory is a reservoir (``training/reservoir.py``), drawn from before the step's images are offered to it: the baseline that
whatever else does with a memory has to beat. Where ``replayed`` is 0, it is fine-tuning among all classes learned so far.

Otherwise than there: the classifier is the text tower with the classes' texts, as all over perdure, and images are cropped at
random, those of the memory too.
"""

from __future__ import annotations

from perdure.methods.base import register
from perdure.methods.base_replay import ReplayMethod


@register("experience_replay", paper="arXiv:1902.10486")
class ExperienceReplay(ReplayMethod):
    """Fine-tuning on the task and on a bounded memory of real images, a reservoir."""
