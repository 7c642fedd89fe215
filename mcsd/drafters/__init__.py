"""Drafters: where token trees come from."""

from .base import Drafter, Proposal, State
from .model import ModelDrafter
from .ngram import NgramDrafter

__all__ = ["Drafter", "ModelDrafter", "NgramDrafter", "Proposal", "State"]
