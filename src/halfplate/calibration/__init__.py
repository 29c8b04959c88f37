"""Calibration: the tokens that the model is run on, and the statistics of what then reaches its linears."""

from halfplate.calibration.collect import collect_against_dense, collect_block
from halfplate.calibration.documents import read_text, token_stream
from halfplate.calibration.text import CalibrationTokens, calibration_tokens

__all__ = [
    "CalibrationTokens",
    "calibration_tokens",
    "collect_against_dense",
    "collect_block",
    "read_text",
    "token_stream",
]
