"""A model in use: ``Learner``, what it is made with, shown and asked, and what it leaves for others."""

from perdure.launch.learner.learner import Learner

__all__ = ["Learner"]
