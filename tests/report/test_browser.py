"""The page in a real browser."""

import json

import pytest

from halfplate.report import write_report

WORST = "#worst table"


def column(browser, index):
    """The texts of a column of the table of the worst matrices, as they stand."""
    return browser.execute_script(
        f"return [...document.querySelector('{WORST}').tBodies[0].rows].map((row) => row.cells[{index}].textContent)"
    )


def click(browser, index):
    browser.execute_script(
        f"document.querySelector('{WORST}').tHead.rows[0].cells[{index}].querySelector('button').click()"
    )


def requests(browser):
    """Every address that the page asked for, itself among them."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    return {event["params"]["request"]["url"] for event in sent}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_renders_without_an_error_or_a_request(compressed, open_page, width, scheme):
    browser = open_page(compressed / "report.html", width, scheme)
    assert browser.get_log("browser") == []
    assert requests(browser) <= {(compressed / "report.html").resolve().as_uri()}
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.querySelectorAll('#errors rect.cell').length") == 14
    assert (
        len(browser.execute_script("return [...document.querySelectorAll('#losses polyline.median')].map(String)")) == 7
    )
    shades = browser.execute_script(
        "return [...document.querySelectorAll('#errors rect.cell')].map((cell) => getComputedStyle(cell).fill)"
    )
    assert len(set(shades)) > 3
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) > 600) == (scheme == "light")


def test_sorting(compressed, open_page):
    browser = open_page(compressed / "report.html")
    names, errors = column(browser, 0), [float(error) for error in column(browser, 2)]
    assert errors == sorted(errors, reverse=True)
    click(browser, 2)
    assert [float(error) for error in column(browser, 2)] == sorted(errors)
    click(browser, 2)
    assert column(browser, 0) == names
    click(browser, 0)
    assert column(browser, 0) == sorted(names)
    assert browser.execute_script(f"return document.querySelectorAll('{WORST} [aria-sort]').length") == 1
    assert browser.get_log("browser") == []


def test_numbers_are_sorted_by_value_and_what_is_unknown_comes_last(compressed, open_page):
    """Shapes and bytes are told to the sorting by their size, not by how they read."""
    (compressed / "log.jsonl").unlink()
    browser = open_page(write_report(compressed))
    size = f"return [...document.querySelector('{WORST}').tBodies[0].rows].map((row) => Number(row.cells[1].dataset.v))"
    click(browser, 1)
    assert browser.execute_script(size) == sorted(browser.execute_script(size))
    click(browser, 5)
    assert set(column(browser, 5)) == {""}
    assert browser.get_log("browser") == []


def test_print_is_light_and_without_scrolling(compressed, open_page):
    browser = open_page(compressed / "report.html", 800, "dark", media="print")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.execute_script("return getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"


def test_hostile_text_is_inert(hostile, open_page):
    browser = open_page(write_report(hostile))
    assert browser.execute_script("return window.hacked === undefined")
    assert browser.get_log("browser") == []
    assert requests(browser) <= {(hostile / "report.html").resolve().as_uri()}
    assert browser.execute_script("return document.scripts.length") == 1
    assert browser.execute_script("return document.querySelectorAll('img, iframe, link, object, style').length") == 1
    said = browser.execute_script("return document.body.textContent")
    assert "<img src=x onerror=window.hacked=1>" in said
    assert "{{ 7*7 }}" in said
    assert "\u202e" not in said
    click(browser, 0)
    assert browser.execute_script("return window.hacked === undefined")


def test_the_policy_stops_what_escaping_would_let_through(compressed, open_page, tmp_path):
    page = (compressed / "report.html").read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(
        page.replace("</main>", "<script>window.hacked=1</script><img src=x onerror=window.hacked=1></main>")
    )
    browser = open_page(broken)
    assert browser.execute_script("return window.hacked === undefined")
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
