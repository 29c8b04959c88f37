"""The licence that a dense model's own files name."""

from pathlib import Path

import yaml

from halfplate.models.sources import Source


def origin(source: Source) -> dict[str, str | None]:
    """What a checkpoint keeps of where its model came from: the Hub id (None for a file or folder) and the licence."""
    return {"base_model": source.name if source.kind == "hub" else None, "license": licence_of(source)}


def licence_of(source: Source) -> str | None:
    """The licence in the model card of a folder, in its config.json or in a GGUF header; None where none says."""
    if source.gguf_header is not None:
        return source.gguf_header.licence
    for found in (_front_matter(source.path / "README.md").get("license"), getattr(source.config, "license", None)):
        if isinstance(found, str) and found.strip():
            return " ".join(found.split())
    return None


def _front_matter(card: Path) -> dict[str, object]:
    try:
        head, separator, rest = card.read_text(encoding="utf-8").partition("---\n")
        data = yaml.safe_load(rest.partition("\n---")[0]) if separator and not head.strip() else None
    # A card is prose for people: what cannot be read names no licence.
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}
