"""The documentation as a site: it builds without a warning, says all that the command line can do, and needs no network."""

import argparse
import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
import verbs  # noqa: E402

NAMES = verbs.names()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    pytest.importorskip("material", reason="mkdocs-material is not installed (pip install '.[docs]')")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr, run.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Where a server of this machine shows the site."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_a_verb_names_every_argument_with_its_help(name):
    text = verbs.pages(ROOT)[f"verbs/{name}.md"]
    for action in verbs.parsers()[name]._actions:
        shown = action.help != argparse.SUPPRESS and action.dest != "help"
        assert all((f"`{option}" in text) == shown for option in action.option_strings)
        if shown:
            assert action.help
            assert action.help.split("*")[0].replace("|", "\\|") in text


def test_every_verb_has_a_page_in_the_site(site):
    assert {path.stem for path in (site / "verbs").glob("*.html")} == {*NAMES, "index"}
    menu = (site / "index.html").read_text()
    assert all(f'href="verbs/{name}.html"' in menu for name in NAMES)


def test_the_commands_of_a_verb_are_those_of_the_page_of_examples():
    lines = verbs.examples(ROOT)
    page = (ROOT / "docs" / "commands.md").read_text()
    assert sum(map(len, lines.values())) == len(re.findall(r"^\$ halfplate", page, re.M))
    assert set(lines) <= set(NAMES)


def test_the_reference_has_every_public_name(site):
    import halfplate

    text = (site / "reference.html").read_text()
    for name in halfplate.__all__:
        assert name.startswith("_") or f'id="halfplate.{name}"' in text, name


def test_no_page_asks_for_anything_from_the_network(site):
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = page.read_text()
        assert not re.findall(r"(?:\bsrc=|url\(|@import )[\"']?(?:https?:)?//", text), page
        assert not re.findall(r"<link[^>]+rel=\"(?:stylesheet|preconnect|icon)\"[^>]+href=\"https?://", text), page


def test_files_outside_docs_have_a_page(site):
    assert "def compress" in re.sub(r"<[^>]+>", "", next((site / "files").glob("*method.py.html")).read_text())
    assert {"results.html", "changelog.html", "contributing.html"} <= {path.name for path in site.iterdir()}


def test_drawings_stand_in_the_page(site):
    text = (site / "how-it-works.html").read_text()
    assert text.count('<figure class="drawing"><svg role="img" aria-label="') == 3


@pytest.mark.parametrize("page", ["index.html", "how-it-works.html", "comparison.html", "verbs/compress.html"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_a_browser_shows_it_without_an_error(address, open_page, page, width, scheme):
    browser = open_page(address + page, width, scheme)
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    asked = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert asked
    assert all(found.startswith((address, "data:")) for found in asked), asked
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 600) == (scheme == "light")
