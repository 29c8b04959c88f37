"""Held-out text for evaluation without a data set: sampled from the original model with a separate seed."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfplate.calibration import CalibrationTokens, calibration_tokens
from halfplate.calibration.text import check_tokens_fit
from halfplate.telemetry.progress import Report

# One seed for all, so that models are comparable, and one that nobody chooses for calibration.
HELD_OUT_SEED = 1_000_003


def held_out_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration_seed: int | None,
    windows: int,
    seq_len: int,
    report: Report,
) -> CalibrationTokens:
    """Windows (windows, seq_len) of the text of the dense `model`, from another seed than `calibration_seed`."""
    check_tokens_fit("windows", windows, seq_len)
    seed = HELD_OUT_SEED + (calibration_seed == HELD_OUT_SEED)
    return calibration_tokens(
        "self",
        model,
        tokenizer,
        windows,
        seq_len,
        seed,
        lambda done, total: report("sampling held-out text", done, total),
    )
