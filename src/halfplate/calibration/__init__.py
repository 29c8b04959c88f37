"""Calibration: the calibration tokens, and the statistics of the inputs of the linears."""

from halfplate.calibration.collect import BATCH, collect_block, head_gram, input_stages, recorded_inputs, stage_sums
from halfplate.calibration.documents import read_text, token_stream
from halfplate.calibration.text import CalibrationTokens, calibration_tokens

__all__ = [
    "BATCH",
    "CalibrationTokens",
    "calibration_tokens",
    "collect_block",
    "head_gram",
    "input_stages",
    "read_text",
    "recorded_inputs",
    "stage_sums",
    "token_stream",
]
