"""A few of the fuzzed configurations of `tests/stress/fuzz.py`: each is planned, or refused in one line."""

import random

from fuzz_configs import ARCHITECTURES, fuzz_configs

KINDS = (
    "llama",
    "qwen2",
    "qwen3_moe",
    "gemma2",
    "gemma4_text",
    "mamba",
    "phi3",
    "opt",
    "gpt_neox",
    "falcon",
    "mixtral",
    "bloom",
)


def test_configurations_are_planned_or_refused_in_one_line(tmp_path):
    assert len(ARCHITECTURES) >= 40
    counts = fuzz_configs(60, random.Random(0), tmp_path / "models", tmp_path / "crashes", KINDS)
    kept = [(path.parent.name, path.read_text()[-600:]) for path in (tmp_path / "crashes").glob("*/why.txt")]
    assert kept == []
    assert counts["taken"] + counts["refused"] == counts["inputs"] == 60
    assert counts["of several lines"] == 0
    assert counts["taken unchanged"] == len(KINDS)
    assert counts["taken"] >= 10
    assert counts["refused"] >= 10
