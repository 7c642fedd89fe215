"""Drafters: where token trees come from."""

from .base import Drafter, Proposal, State
from .early_exit import EarlyExitDrafter
from .feature import FeatureDrafter
from .heads import HeadsDrafter
from .levels import LevelDrafter
from .medusa import MedusaHeads
from .merged import MergedDrafter
from .mlp_speculator import MLPSpeculator
from .model import ModelDrafter
from .ngram import NgramDrafter
from .stopping import ConfidenceStop, EntropyStop, Stopping
from .topk import TopKDrafter
from .trie import TrieDrafter

__all__ = [
    "ConfidenceStop",
    "Drafter",
    "EarlyExitDrafter",
    "EntropyStop",
    "FeatureDrafter",
    "HeadsDrafter",
    "LevelDrafter",
    "MLPSpeculator",
    "MedusaHeads",
    "MergedDrafter",
    "ModelDrafter",
    "NgramDrafter",
    "Proposal",
    "State",
    "Stopping",
    "TopKDrafter",
    "TrieDrafter",
]
