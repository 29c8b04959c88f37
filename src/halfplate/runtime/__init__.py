"""Running compressed models fast: which kernel each linear takes, and decoding without Python between the layers."""

from halfplate.runtime.decoder import greedy
from halfplate.runtime.prepare import Acceleration, accelerate, explain, restore

__all__ = ["Acceleration", "accelerate", "explain", "greedy", "restore"]
