"""Calibration: the tokens that the model is run on, and the statistics of what then reaches its linears."""

from halfplate.calibration.collect import BATCH, DenseRun, collect_block, collect_stage, input_stages
from halfplate.calibration.documents import read_text, token_stream
from halfplate.calibration.text import CalibrationTokens, calibration_tokens

__all__ = [
    "BATCH",
    "CalibrationTokens",
    "DenseRun",
    "calibration_tokens",
    "collect_block",
    "collect_stage",
    "input_stages",
    "read_text",
    "token_stream",
]
