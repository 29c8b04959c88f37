"""Numbers beyond what any machine has are refused in one line that names the argument, the value and what would do."""

import json
from pathlib import Path

import pytest

QUICK = ["--samples", "2", "--seq-len", "16", "--threads", "1"]
LARGE, HUGE = 10**12, 10**30
NEEDS, RANGE = "of memory, but this process can use", "is out of range; expected at least"

COMPRESS = ["compress", "MODEL", "-o", "NEW"]
EVAL = ["eval", "OUT", "--against", "MODEL"]
BENCH = ["bench", "OUT", "--prompt", "4", "--new-tokens", "2"]
REPORT = ["report", "OUT", "-o", "NEW", "--against", "MODEL"]
RECOVER = ["recover", "OUT", "--teacher", "MODEL", "-o", "NEW", "--tokens", "16", "--samples", "4", "--seq-len", "16"]
CASES = [
    (
        ["plan", "MODEL"],
        "--samples",
        LARGE,
        ("samples=1000000000000 windows of seq_len=512 need", NEEDS, "try samples="),
    ),
    (["plan", "MODEL"], "--seq-len", LARGE, ("seq_len=1000000000000 need", NEEDS)),
    (["plan", "MODEL"], "--seed", HUGE, (f"seed={HUGE} {RANGE}",)),
    (COMPRESS, "--samples", LARGE, ("samples=1000000000000 windows of seq_len=512 need", NEEDS, "try samples=")),
    ([*COMPRESS, "--calibration", "TEXT"], "--samples", LARGE, ("samples=1000000000000", NEEDS, "try samples=")),
    (COMPRESS, "--samples", HUGE, (f"samples={HUGE} {RANGE}",)),
    (COMPRESS, "--seq-len", LARGE, ("seq_len=1000000000000 need", NEEDS)),
    (COMPRESS, "--seq-len", HUGE, (f"seq_len={HUGE} {RANGE}",)),
    (COMPRESS, "--tune-block", HUGE, (f"tune_block={HUGE} {RANGE}",)),
    (COMPRESS, "--workers", HUGE, (f"workers={HUGE} is more than the", "cores")),
    (COMPRESS, "--threads", HUGE, (f"threads={HUGE} {RANGE}",)),
    (
        [*COMPRESS, "--core-dtype", "int4"],
        "--group-size",
        LARGE,
        ("group_size=1000000000000 is not one of 16, 32, 64, 128",),
    ),
    ([*COMPRESS, "--method", "slim"], "--option", "rank=9", ("rank='9' is not an option of method 'slim'",)),
    (EVAL, "--windows", LARGE, ("windows=1000000000000 windows of seq_len=256 need", NEEDS, "try windows=")),
    (EVAL, "--seq-len", LARGE, ("the logits of seq_len=1000000000000 tokens need", NEEDS, "try seq_len=")),
    ([*EVAL, "--text", "TEXT"], "--windows", HUGE, (f"windows={HUGE}", NEEDS, "try windows=")),
    ([*EVAL, "--text", "TEXT"], "--seq-len", HUGE, (f"seq_len={HUGE} exceeds the {2**40} positions",)),
    (BENCH, "--prompt", LARGE, ("after 1000000000000 tokens of prompt need", NEEDS)),
    (
        BENCH,
        "--new-tokens",
        LARGE,
        ("new_tokens=1000000000000 after 4 tokens of prompt need", NEEDS, "try new_tokens="),
    ),
    (["generate", "OUT", "Tom"], "--max-new-tokens", LARGE, ("max_new_tokens=1000000000000 after", NEEDS)),
    (["generate", "OUT", "Tom"], "--max-new-tokens", HUGE, (f"max_new_tokens={HUGE}", f"the {2**40} positions")),
    (REPORT, "--windows", LARGE, ("windows=1000000000000 windows of seq_len=256 need", NEEDS, "try windows=")),
    (REPORT, "--seq-len", LARGE, ("seq_len=1000000000000 need", NEEDS)),
    (RECOVER, "--samples", LARGE, ("samples=1000000000000 windows of seq_len=16 need", NEEDS, "try samples=")),
    (RECOVER, "--seq-len", LARGE, ("seq_len=1000000000000 need", NEEDS)),
    (RECOVER, "--batch", LARGE, ("batch=1000000000000 sequences of seq_len=16 need", NEEDS, "try batch=")),
    (RECOVER, "--batch", HUGE, (f"batch={HUGE} is too large",)),
    ([*RECOVER, "--text", "TEXT"], "--seq-len", LARGE, ("seq_len=1000000000000 need", "a seq_len up to")),
]


@pytest.fixture
def places(halfplate, tiny_folder, tmp_path):
    """A model whose configuration allows texts of any length, its checkpoint, and a text."""
    config = tiny_folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2**40}))
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Tom and Mia saw the bird. " * 40)
    done = halfplate("compress", tiny_folder, "-o", out, "--method", "wanda", *QUICK, "--calibration", text)
    assert done.status == 0, done.err
    return {"MODEL": tiny_folder, "OUT": out, "TEXT": text, "NEW": tmp_path / "new"}


@pytest.mark.slow
def test_absurd_numbers_are_refused_in_one_line(halfplate, places):
    for command, option, value, parts in CASES:
        outcome = halfplate(*(places.get(word, word) for word in command), option, value)
        outcome.refused(*parts)
        assert not Path(places["NEW"]).exists(), (command, option)
