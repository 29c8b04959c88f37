"""Calibration text from several sources: shares, sequences, and the record."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfplate.calibration import calibration_tokens
from halfplate.calibration.documents import check_source
from halfplate.calibration.mixture import Part, parts_of, sampled_samples, samples_of
from halfplate.calibration.starts import CHAT, ORDER, varied_starts
from halfplate.calibration.text import recorded_hashes, text_hashes
from halfplate.cli import build_parser
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.recipe import Recipe

WORDS = "On day {} Tom saw {} birds near the house. "


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Two texts, one with a colon and a space in its name."""
    paths = [tmp_path / "a.txt", tmp_path / "my b:0.2.txt"]
    for number, path in enumerate(paths):
        path.write_text("".join(WORDS.format(day, day + 1000 * number) for day in range(60)))
    return [str(path) for path in paths]


@pytest.fixture
def model(tiny_model: Any, tiny_tokenizer: Any) -> Any:
    return tiny_model("llama", vocab_size=len(tiny_tokenizer))


def test_shares_are_read() -> None:
    assert parts_of("pairs.jsonl:question") == (Part("pairs.jsonl:question", 1.0),)
    assert parts_of(["a:b.txt:0.25", "pairs.jsonl:q+a:.25", "self:5e-1"]) == (
        Part("a:b.txt", 0.25),
        Part("pairs.jsonl:q+a", 0.25),
        Part("self", 0.5),
    )
    assert [part.share for part in parts_of(["a.txt", "org/name:config", "self"])] == [1 / 3] * 3
    assert sum(part.share for part in parts_of(["a:0.33", "b:0.33", "c:0.33"])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("calibration", "reason"),
    [
        (["a.txt:0.5", "self:0.4"], r"calibration='a.txt:0.5 self:0.4': the shares add up to 0.9, expected 1"),
        (["a.txt:0.7", "self:0.7"], "add up to 1.4"),
        (["a.txt:0.5", "./a.txt:0.5"], "names './a.txt' twice"),
        (["self", "self"], "names 'self' twice"),
        (["a.txt:0.5", "self"], "'self' has no share; write self:0.5"),
        (["a.txt:1.5", "self:-0.5"], "the share 1.5 of 'a.txt' must be above 0 and up to 1"),
        (["a.txt:0", "self:1"], "the share 0 of 'a.txt'"),
        ([":0.5", "self:0.5"], "':0.5' names no source"),
        ([], "names no source"),
        ("self:0.5", "a share is for several sources"),
        ("a.txt:0.5", "a share is for several sources"),
    ],
)
def test_what_does_not_add_up_is_refused(calibration: Any, reason: str) -> None:
    with pytest.raises(HalfplateError, match=reason):
        parts_of(calibration)
    with pytest.raises(HalfplateError, match=reason):
        Recipe(calibration=calibration if isinstance(calibration, str) else tuple(calibration))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 300))
def test_every_sequence_is_given_and_every_source_gives_one(weights: list[int], more: int) -> None:
    parts = [Part(str(number), weight / sum(weights)) for number, weight in enumerate(weights)]
    samples = len(parts) + more
    counts = samples_of(parts, samples)
    assert sum(counts) == samples
    assert min(counts) >= 1
    for part, count in zip(parts, counts, strict=True):
        assert count == 1 or count <= part.share * samples + 1


def test_half_and_half() -> None:
    assert samples_of(parts_of(["a:0.5", "b:0.5"]), 64) == (32, 32)
    assert samples_of(parts_of(["a:0.75", "b:0.25"]), 64) == (48, 16)
    assert sampled_samples(["a.txt:0.75", "self:0.25"], 64) == 16
    assert (sampled_samples("self", 64), sampled_samples("a.txt", 64)) == (64, 0)
    with pytest.raises(HalfplateError, match="samples=1 is fewer than the 2 sources"):
        Recipe(calibration=("a.txt", "self"), samples=1)


def test_the_sequences_are_those_of_each_source(model: Any, tiny_tokenizer: Any, texts: list[str]) -> None:
    source = [f"{texts[0]}:0.5", f"{texts[1]}:0.25", "self:0.25"]
    mixed = calibration_tokens(source, model, tiny_tokenizer, 8, 16, seed=3)
    alone = [
        calibration_tokens(name, model, tiny_tokenizer, count, 16, seed=3)
        for name, count in ((texts[0], 4), (texts[1], 2), ("self", 2))
    ]
    rows = [tuple(row) for tokens in alone for row in tokens.ids.tolist()]
    assert Counter(rows) == Counter(tuple(row) for row in mixed.ids.tolist())
    assert rows != [tuple(row) for row in mixed.ids.tolist()]
    record = mixed.protocol()
    assert record["source"] == " ".join(source)
    assert [(text["samples"], text["share"]) for text in record["sources"]] == [(4, 0.5), (2, 0.25), (2, 0.25)]
    assert [text["sha256"] for text in record["sources"]] == [tokens.protocol()["sha256"] for tokens in alone]
    hashes = text_hashes(source, model, tiny_tokenizer, 8, 16, 3)
    assert hashes == recorded_hashes(record) == {tokens.source: tokens.protocol()["sha256"] for tokens in alone[:2]}


def test_a_source_without_enough_text_says_how_much_it_gives(
    model: Any, tiny_tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(WORDS.format(1, 1) * 4)
    with pytest.raises(
        HalfplateError, match=r"short.txt'.*16 of samples=32 .* gives \d+ tokens \(\d windows\).*share of at most 0\.\d"
    ):
        calibration_tokens([f"{short}:0.5", f"{texts[0]}:0.5"], model, tiny_tokenizer, 32, 16, seed=0)
    short.write_text("Tom")
    with pytest.raises(HalfplateError, match=r"\(0 windows\); pass a longer text, or leave it out"):
        calibration_tokens([f"{short}:0.5", f"{texts[0]}:0.5"], model, tiny_tokenizer, 32, 16, seed=0)


def test_varied_starts(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = varied_starts(tiny_tokenizer, 1, 16, seed=0)
    assert [bool(start) for start in plain] == [kind not in ("plain", CHAT) for kind in ORDER] * 2
    assert all(start[0] == 1 for start in plain if start)
    assert plain == varied_starts(tiny_tokenizer, 1, 16, seed=0) != varied_starts(tiny_tokenizer, 1, 16, seed=1)
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "<s>{{ messages[0].content }}\n")
    talk = varied_starts(tiny_tokenizer, 1, 16, seed=0)
    assert [bool(start) for start in talk] == [kind != "plain" for kind in ORDER] * 2
    assert len({tuple(start) for start in talk if start}) == 8


def test_generated_text_begins_as_it_should_and_goes_on_with_the_model(model: Any, tiny_tokenizer: Any) -> None:
    tokens = calibration_tokens("self:varied", model, tiny_tokenizer, 8, 40, seed=0)
    starts = varied_starts(tiny_tokenizer, 1, 8, seed=0)
    plain = calibration_tokens("self", model, tiny_tokenizer, 8, 40, seed=0)
    for row, same, start in zip(tokens.ids.tolist(), plain.ids.tolist(), starts, strict=True):
        assert row[: len(start)] == start[:40]
        assert (row == same) == (not start)
    assert tokens.protocol()["source"] == "self:varied"
    assert tokens.protocol()["start"] == "bos"
    check_source("self:varied")


def test_a_compression_names_its_sources_and_resumes(tiny_folder: Path, tmp_path: Path, texts: list[str]) -> None:
    recipe = Recipe(method="wanda", calibration=(f"{texts[1]}:0.5", "self:0.5"), samples=4, seq_len=16, threads=1)
    out = tmp_path / "out"
    summary = compress(str(tiny_folder), out, recipe)
    assert [text["source"] for text in summary["calibration"]["sources"]] == [texts[1], "self"]
    assert compress(str(tiny_folder), out, recipe, resume=True)["seconds"].keys() == {"total"}
    page = (out / "report.html").read_text()
    assert f"(2 sequences of {texts[1]}, 2 sequences of self)" in page
    assert f"2 of {texts[1]}, 2 of self" in (out / "README.md").read_text()
    Path(texts[1]).write_text("".join(WORDS.format(day, day + 5) for day in range(60)))
    with pytest.raises(HalfplateError, match=r"--resume: tokens was"):
        compress(str(tiny_folder), out, recipe, resume=True)


def test_an_interrupted_compression_keeps_what_it_generated(
    tiny_folder: Path, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(method="wanda", calibration=(f"{texts[0]}:0.5", "self:0.5"), samples=4, seq_len=16, threads=1)
    whole = compress(str(tiny_folder), tmp_path / "whole", recipe)["calibration"]
    with monkeypatch.context() as patch:
        patch.setattr("halfplate.compression.compress.assemble_weights", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(str(tiny_folder), tmp_path / "out", recipe)
    # Nothing is generated again.
    monkeypatch.setattr("halfplate.calibration.text.sample_text", None)
    assert compress(str(tiny_folder), tmp_path / "out", recipe, resume=True)["calibration"] == whole


def test_the_command_line_and_recipes_take_several(
    halfplate_main: Any, tiny_folder: Path, tmp_path: Path, texts: list[str]
) -> None:
    options = ("--method", "wanda", "--samples", "4", "--seq-len", "16", "--no-benchmark")
    shares = [f"{texts[0]}:0.75", "self:0.25"]
    assert f"3 from {texts[0]}, 1 from self (generated)" in halfplate_main(
        "plan", tiny_folder, *options, "--calibration", *shares
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(f"method: wanda\nsamples: 4\ncalibration:\n- '{shares[0]}'\n- {shares[1]}\n")
    recipe = Recipe.from_yaml(file)
    assert recipe.calibration == tuple(shares)
    assert recipe.sampled == 1
    assert Recipe.from_mapping(recipe.to_json()) == recipe


@pytest.fixture
def halfplate_main(capsys: pytest.CaptureFixture[str]) -> Any:
    from halfplate.cli import main

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return " ".join(capsys.readouterr().out.split())

    return run


def test_given_tokens_stop_at_the_end_of_the_sequence() -> None:
    from halfplate.calibration.self_text import given_tokens

    assert torch.equal(given_tokens([[1, 2, 3], []], 3, 2), torch.tensor([[1, 2], [-1, -1], [-1, -1]]))


@pytest.mark.parametrize(
    "words",
    [
        "plan M --calibration a.txt:0.5 my:b.txt:.25 self:2.5e-1 --samples 8",
        "plan --calibration a.txt:0.5 my:b.txt:.25 self:2.5e-1 M --samples 8",
        "plan --calibration=a.txt:0.5 my:b.txt:.25 self:2.5e-1 M --samples 8",
        "plan --calibration a.txt:0.5 --samples 8 --calibration my:b.txt:.25 --calibration=self:2.5e-1 M",
    ],
)
def test_options_may_stand_before_the_model(words: str) -> None:
    args = build_parser().parse_args(words.split())
    assert (args.model, args.samples) == ("M", "8")
    assert args.calibration == ["a.txt:0.5", "my:b.txt:.25", "self:2.5e-1"]


def test_a_source_without_a_share_is_one_word() -> None:
    args = build_parser().parse_args(["plan", "--calibration", "org/name:config", "M"])
    assert (args.model, args.calibration) == ("M", ["org/name:config"])
