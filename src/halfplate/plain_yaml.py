"""Reading untrusted YAML of plain values, within limits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

LARGEST = 2**20  # bytes or characters
DEEPEST = 10  # levels of nesting


class _Loader(yaml.SafeLoader):
    """A safe loader without aliases (which can expand to any size), without deep nesting, and with unique names."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            names = Counter(name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode))
            for name, count in names.most_common(1):
                if count > 1:
                    raise yaml.YAMLError(f"{name[:80]!r} occurs in it twice")
        return node


def read(path: str | Path) -> Any:
    """The value in a file; raises OSError if it cannot be read, and ValueError as `parse` does."""
    # Limited here, because the system reports no size for a pipe.
    with Path(path).open("rb") as file:
        return parse(file.read(LARGEST + 1).decode("utf-8"))


def parse(text: str | bytes) -> Any:
    """The value of `text`; raises ValueError unless it is YAML of plain values within the limits."""
    if len(text) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
