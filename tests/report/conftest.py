"""A checkpoint that has a log, and one whose every text is hostile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from halfplate.compression.compress import compress
from halfplate.recipe import Recipe

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    '"><svg onload=window.hacked=1>',
    "{{ 7*7 }}{% for x in y %}",
    "javascript:window.hacked=1",
    "<style>*{display:none}</style><meta http-equiv=refresh content='0;url=http://example.com'>",
    "a\u202etxt.exe\x00\x1b[31m\u2028'`&amp;",
)


@pytest.fixture(scope="session")
def compressed_once(tmp_path_factory: pytest.TempPathFactory, tiny_folder_once: Path) -> Path:
    """The tiny model compressed by ARMOR, with its log and its report."""
    out = tmp_path_factory.mktemp("report") / "out"
    options = {"iterations": 3}
    recipe = Recipe(block_size=4, method_options=options, samples=4, seq_len=32, threads=1)
    compress(str(tiny_folder_once), out, recipe)
    return out


@pytest.fixture
def compressed(compressed_once: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(compressed_once, tmp_path / "out"))


@pytest.fixture
def hostile(compressed: Path) -> Path:
    """The same with scripts wherever a checkpoint, its tokenizer or its log may hold text, module names among it."""
    evil = "".join(HOSTILE)
    weights = compressed / "model.safetensors"
    old = "model.layers.1.self_attn.o_proj"
    new = f"model.layers.1.{evil.replace('.', '')}"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(weights).items()}, weights)
    config = json.loads((compressed / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules[new] = modules.pop(old)
    (compressed / "config.json").write_text(json.dumps(config))
    record = json.loads((compressed / "halfplate.json").read_text())
    record["matrices"][new] = record["matrices"].pop(old)
    record |= {"skipped": {evil: evil}, "fingerprint": evil, "recoveries": [evil]}
    record["calibration"] = dict.fromkeys(record["calibration"], evil)
    (compressed / "halfplate.json").write_text(json.dumps(record))
    _poison(compressed / "log.jsonl", evil)
    return compressed


def _poison(log: Path, evil: str) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(item) for key, item in value.items() if key not in ("event", "recipe")} | {
                key: value[key] for key in ("event", "recipe") if key in value
            }
        return evil if isinstance(value, str) else value

    lines = [poisoned(json.loads(line)) for line in log.read_text().splitlines()]
    quality = {"kl": 0.5, "perplexity": evil, "windows": evil, "protocol": {"source": "self", "seed": evil}}
    speed = {"decode_tokens_per_s": 3.0, "decode_speedup": evil, "threads": evil, "dense": {"dtype": evil}}
    answers = [{"prompt": evil, "dense": evil, "compressed": evil}]
    lines.append({"event": "measures", "against": evil, "quality": quality, "speed": speed, "answers": answers})
    log.write_text("\n".join(map(json.dumps, lines)) + "\nnot JSON\n[1]\n" + "[" * 100_000 + "\n")
