"""The licence that the files of an original model name."""

from pathlib import Path

from halfplate import plain_yaml
from halfplate.models.sources import Source

LARGEST_CARD = 2 * plain_yaml.LARGEST  # characters, including the text after the front matter


def origin(source: Source) -> dict[str, str | None]:
    """The origin of a model, as recorded in a checkpoint: the Hub id (None for a file or folder) and the licence."""
    return {"base_model": source.name if source.kind == "hub" else None, "license": licence_of(source)}


def licence_of(source: Source) -> str | None:
    """The licence in the model card of a folder, in its config.json or in a GGUF header; None if none is given."""
    if source.gguf_header is not None:
        return source.gguf_header.licence
    for found in (_front_matter(source.path / "README.md").get("license"), getattr(source.config, "license", None)):
        if isinstance(found, str) and found.strip():
            return " ".join(found.split())
    return None


def _front_matter(card: Path) -> dict[str, object]:
    try:
        if not card.is_file():  # opening a pipe would wait for a writer
            return {}
        with card.open(encoding="utf-8") as file:
            head, separator, rest = file.read(LARGEST_CARD).partition("---\n")
        data = plain_yaml.parse(rest.partition("\n---")[0]) if separator and not head.strip() else None
    # A card that cannot be parsed names no licence.
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
