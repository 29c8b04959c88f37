"""What `mkdocs build` adds to the Markdown of docs/: a page of every verb, the reference, and the files outside docs/ that pages link to."""

import re
import sys
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))  # the site describes this working copy, not an installed Halfplate

import verbs  # noqa: E402  (beside this file; mkdocs puts the folder on the path)

OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
PICTURE = re.compile(r"!\[([^\]]*)\]\((pictures/[\w.-]+\.svg)\)")
HIDDEN = {"index.md": ["navigation"], "comparison.md": ["toc"], "results.md": ["toc"]}  # wide tables need the room
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages; every one is made from what the package says of itself."""
    for name, text in (verbs.pages(ROOT) | {"reference.md": _reference()}).items():
        files.append(File.generated(config, name, content=text))
    pages = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
    linked = {path for page in pages for path in OUTSIDE.findall(page.read_text())}
    for path in sorted(linked | {"RESULTS.md", "CHANGELOG.md", "CONTRIBUTING.md"}):
        files.append(File.generated(config, _address(path), content=_outside(path)))
    return files


def on_config(config: Any) -> Any:
    """Put a page of every verb where the navigation says `Commands`."""
    for section in config.nav:
        if "Commands" in section:
            section["Commands"] = ["verbs/index.md", *({name: f"verbs/{name}.md"} for name in verbs.names())]
    return config


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of docs/ to the pages made of those files, and put drawings into the page, whose colours then reach them."""
    page.meta["hide"] = HIDDEN.get(page.file.src_uri, [])
    if "/" not in page.file.src_uri:  # deeper pages are our own, and lead up to docs/ by it
        text = OUTSIDE.sub(lambda found: f"]({_address(found[1])}", text)
    return PICTURE.sub(_drawing, text)


def _drawing(found: re.Match[str]) -> str:
    alt, path = found.groups()
    drawing = (ROOT / "docs" / path).read_text()
    if 'class="halfplate"' not in drawing:
        return found[0]
    label = f'<svg role="img" aria-label="{escape(alt)}" '
    return f'<figure class="drawing">{drawing[drawing.index("<svg") :].replace("<svg ", label, 1)}</figure>'


def _address(path: str) -> str:
    """The page of the site that shows a file of the repository."""
    return path.lower() if path.endswith(".md") else f"files/{path.replace('/', '-')}.md"


def _outside(path: str) -> str:
    """A file outside docs/ as a page: Markdown with its links as from docs/, anything else as a listing."""
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return re.sub(r"\]\(docs/", "](", text)
    return f"# {Path(path).name}\n\n`{path}`\n\n```{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}```\n"


def _reference() -> str:
    """One mkdocstrings block a public name."""
    import halfplate

    intro = "# Reference\n\nEvery public name, as its docstring has it. [In Python](python.md) has them in one table.\n"
    names = [name for name in halfplate.__all__ if not name.startswith("_")]
    return intro + "".join(f"\n::: halfplate.{name}\n" for name in sorted(names, key=str.lower))
