"""Lossless multi-candidate speculative decoding over Hugging Face models."""

from .check import Check, check
from .decode import Generation, generate
from .drafters import Drafter, ModelDrafter, NgramDrafter, Proposal, State
from .scoring import UnsupportedModelError
from .stats import Stats

__all__ = [
    "Check",
    "Drafter",
    "Generation",
    "ModelDrafter",
    "NgramDrafter",
    "Proposal",
    "State",
    "Stats",
    "UnsupportedModelError",
    "check",
    "generate",
]
