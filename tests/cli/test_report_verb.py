import shlex

from halfplate.errors import HalfplateError
from halfplate.report.findings import gather


def test_the_verb(checkpoint, halfplate, tiny_folder, tmp_path):
    said = halfplate("report", checkpoint)
    assert (said.status, said.out) == (0, f"report: {checkpoint / 'report.html'}\n")
    elsewhere = tmp_path / "page.html"
    assert halfplate("report", checkpoint, "-o", elsewhere, "--json").json() == {"report": str(elsewhere)}
    assert elsewhere.read_text() == (checkpoint / "report.html").read_text()
    halfplate("report", tiny_folder).refused("not a Halfplate checkpoint")
    halfplate("report", checkpoint, "-o", tmp_path / "no" / "page.html").refused("could not be written")
    halfplate("report", checkpoint, "--windows", "3").refused("windows=3", "--against")
    halfplate("report", checkpoint, "--against", tmp_path / "none").refused("does not exist")


def test_compress_prints_where_its_report_is(halfplate, tiny_folder, tmp_path):
    outcome = halfplate("compress", tiny_folder, "-o", tmp_path / "out", "--method", "magnitude")
    assert f"report: {tmp_path / 'out' / 'report.html'}" in outcome.out


def test_a_report_that_cannot_be_written_takes_nothing_from_the_checkpoint(
    halfplate, tiny_folder, tmp_path, monkeypatch
):
    def refuses(folder):
        raise HalfplateError("the disk is full")

    monkeypatch.setattr("halfplate.compression.compress.write_report", refuses)
    outcome = halfplate("compress", tiny_folder, "-o", tmp_path / "out", "--method", "magnitude")
    assert (outcome.status, "could not be written" in outcome.out) == (0, True)


def test_the_command_makes_the_same_checkpoint(checkpoint, halfplate):
    command = gather(checkpoint).command
    before = (checkpoint / "model.safetensors").read_bytes()
    command = shlex.split(command)
    assert command[:2] == ["halfplate", "compress"]
    assert halfplate(*command[1:], "--overwrite").status == 0
    assert (checkpoint / "model.safetensors").read_bytes() == before
