"""The files of a model that are neither weights nor configuration nor tokenizer: those of the processors of a multimodal model."""

from __future__ import annotations

import json
from pathlib import Path

from halfplate.errors import HalfplateError
from halfplate.models.trust import read_json_file

# Of images, videos and audio. Chat templates, because that of a multimodal model may belong to its processor.
COMPANIONS = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_preprocessor_config.json",
    "feature_extractor_config.json",
    "chat_template.json",
)
TEMPLATE = "chat_template.jinja"
LARGEST_TEMPLATE = 2**22


def copy_companions(source: Path, out: Path) -> None:
    """Copy the processor files and the chat template in the folder `source` to `out`, except those that `out` has already.

    Raises HalfplateError if one of them is not valid JSON, or a template of more than LARGEST_TEMPLATE bytes.
    """
    for name in COMPANIONS:
        if (source / name).is_file() and not (out / name).exists():
            try:
                content = read_json_file(source / name)
            except (OSError, ValueError) as error:
                raise HalfplateError(
                    f"model={str(source)!r}: {name} is not valid JSON ({error}); download it again, or remove it if it is not needed"
                ) from None
            (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    template = source / TEMPLATE
    if template.is_file() and not (out / TEMPLATE).exists():
        if template.stat().st_size > LARGEST_TEMPLATE:
            raise HalfplateError(
                f"model={str(source)!r}: {TEMPLATE} has {template.stat().st_size} bytes, expected at most {LARGEST_TEMPLATE}; correct or remove it"
            )
        (out / TEMPLATE).write_bytes(template.read_bytes())
