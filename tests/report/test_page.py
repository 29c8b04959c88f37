import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from halfplate.compression.compress import compress
from halfplate.errors import RuinedResult
from halfplate.recipe import Recipe
from halfplate.report import write_report
from halfplate.report.findings import gather, read_log
from halfplate.report.settings import Measuring


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_is_one_file_under_a_strict_policy(compressed):
    page = (compressed / "report.html").read_text()
    elements = Elements(page).found
    assert not [value for _, attributes in elements for name, value in attributes.items() if name in ("src", "href")]
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on") or name == "style"]
    policy = next(a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_says_what_the_checkpoint_says(compressed):
    page = (compressed / "report.html").read_text()
    found = gather(compressed)
    record = json.loads((compressed / "halfplate.json").read_text())
    assert {m.name: m.relative_error for m in found.matrices} == {
        name: matrix["relative_error"] for name, matrix in record["matrices"].items()
    }
    assert all(m.name in page and m.seconds is not None for m in found.matrices)
    assert found.kinds == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sum(found.parts.values()) == found.nbytes == sum(m.nbytes for m in found.matrices)
    worst = max(found.matrices, key=lambda matrix: matrix.relative_error)
    assert found.worst[0] == worst
    assert len(found.worst) == 10
    assert found.fingerprint in page
    assert page.count("not measured") == 5
    assert f"--against {found.model}" in page


def test_the_page_has_a_verdict(compressed):
    assert "<strong>Verdict: " in (compressed / "report.html").read_text()
    record = json.loads((compressed / "halfplate.json").read_text())
    record["check"]["kl"] = 2.0
    (compressed / "halfplate.json").write_text(json.dumps(record))
    page = write_report(compressed).read_text()
    assert "<strong>Verdict: damaged.</strong>" in page
    assert f"<code>halfplate recover {compressed} --teacher" in page
    # After a recovery, the self-check tells of another model.
    (compressed / "halfplate.json").write_text(json.dumps(record | {"recoveries": [{}]}))
    assert "Verdict" not in write_report(compressed).read_text()


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([1.0, 0.5, 0.4], False),
        ([1.0, 0.5, 1.4, 1.2, 1.1], False),  # rounded after the second step
        ([1.0, 0.9, 1.1, 1.3], True),
        ([1.0, -0.1], True),
        ([], False),
    ],
)
def test_a_solver_that_diverged_is_an_alarm(compressed, losses, diverged):
    name, record = "model.layers.1.mlp.down_proj", json.loads((compressed / "halfplate.json").read_text())
    record["matrices"][name]["losses"] = losses
    (compressed / "halfplate.json").write_text(json.dumps(record))
    assert (name in dict(gather(compressed).alarms)) == diverged


def test_without_a_log_the_page_says_so(compressed):
    (compressed / "log.jsonl").unlink()
    page = write_report(compressed).read_text()
    assert "This checkpoint has no log of its run" in page
    assert gather(compressed).command.startswith("halfplate compress ")


@pytest.mark.slow
def test_a_record_of_nonsense(compressed):
    """Whatever is not of the type that belongs there counts as not recorded."""
    nonsense = [7, "x", {"a": [None]}]
    path, whole = compressed / "halfplate.json", json.loads((compressed / "halfplate.json").read_text())
    for key in whole.keys() - {"format_version"}:
        for value in nonsense:
            path.write_text(json.dumps(whole | {key: value}))
            assert "<h1>" in write_report(compressed).read_text()
    matrix = next(iter(whole["matrices"]))
    for key in ("relative_error", "losses", "error_kind"):
        for value in [-1e400, True, [float("nan"), 0.0], [0.0, 0.0], ["x", 1]]:
            changed = whole["matrices"] | {matrix: whole["matrices"][matrix] | {key: value}}
            path.write_text(json.dumps(whole | {"matrices": changed}))
            assert "<h1>" in write_report(compressed).read_text()


def test_a_log_of_nonsense(compressed):
    log = compressed / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for value in (7, "x", {"a": [None]}, 1e300):
        log.write_text(
            "\n".join(json.dumps({k: v if k == "event" else value for k, v in line.items()}) for line in lines)
        )
        assert "<h1>" in write_report(compressed).read_text()
    log.write_bytes(b"\xff\xfe\n{\n")
    assert read_log(log) == []
    log.unlink()
    log.symlink_to(compressed / "config.json")
    assert read_log(log) == []


def test_a_matrix_that_went_wrong_is_named_at_the_top(compressed):
    path = compressed / "halfplate.json"
    record = json.loads(path.read_text())
    name = "model.layers.1.mlp.up_proj"
    record["matrices"][name] |= {"relative_error": 3.0, "losses": [0.1, 0.05, -20.0]}
    path.write_text(json.dumps(record))
    page = write_report(compressed).read_text()
    assert "1 of 14 matrices went wrong" in page
    assert gather(compressed).alarms[0][0] == name


def test_a_method_without_losses_and_with_skipped_matrices(tiny_folder, tmp_path):
    out = tmp_path / "magnitude"
    compress(str(tiny_folder), out, Recipe(method="magnitude", exclude=("*.k_proj",)))
    page = (out / "report.html").read_text()
    assert "The method does not iterate" in page
    assert "Not compressed" in page


@pytest.mark.slow
def test_a_ruined_result_has_its_report(tiny_folder, tmp_path):
    recipe = Recipe(method="wanda", samples=4, seq_len=32, max_kl=1e-9)
    with pytest.raises(RuinedResult):
        compress(str(tiny_folder), tmp_path / "out", recipe)
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_measured_against_the_dense_model(compressed, tiny_folder_once):
    measuring = Measuring(str(tiny_folder_once), windows=2, seq_len=32, prompts=("The bird",), new_tokens=4, rounds=1)
    page = write_report(compressed, measuring=measuring).read_text()
    found = gather(compressed)
    assert found.quality["kl"] > 0
    assert found.speed["decode_speedup"] > 0
    assert found.answers[0]["prompt"] == "The bird"
    assert "not measured" not in page
    # What was measured stays for later reports.
    assert write_report(compressed).read_text() == page


@pytest.mark.slow
def test_measures_on_text(compressed, tiny_folder_once, tmp_path):
    text_file = tmp_path / "story.txt"
    text_file.write_text("One day a small bird sat in a big tree. " * 60)
    measuring = Measuring(str(tiny_folder_once), text=str(text_file), windows=2, seq_len=32, prompts=(), rounds=1)
    assert "2 windows of 32 tokens of story.txt" in write_report(compressed, measuring=measuring).read_text()


def test_a_copy_elsewhere_reads_the_same(compressed, tmp_path):
    shutil.copytree(compressed, tmp_path / "copy")
    first, second = gather(compressed), gather(tmp_path / "copy")
    assert first.matrices == second.matrices
    assert first.command == second.command
