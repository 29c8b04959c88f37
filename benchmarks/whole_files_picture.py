"""Draw KL against the bytes of whole files, ours and llama.cpp's, from the tables of RESULTS.md: docs/pictures/whole_files.svg.

python benchmarks/whole_files_picture.py
"""

from typing import Any

from common import ROOT

from halfplate.sweeps.picture import picture
from halfplate.sweeps.records import DONE

PICTURE = ROOT / "docs" / "pictures" / "whole_files.svg"
KL = "wikitext2_valid: KL"


def rows_of(section: str) -> list[dict[str, str]]:
    """The rows of the table in a section of RESULTS.md, by the names of the columns; `KL` is that of the first text."""
    content = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    lines = content.partition(f"<!-- {section}: begin -->")[2].partition(f"<!-- {section}: end -->")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [dict(reversed([*zip(head, row, strict=True)])) for row in rows]


def measured(name: str, megabytes: str, kl: str) -> dict[str, Any]:
    """A row as the picture of a sweep takes it."""
    nbytes = round(float(megabytes) * 1e6)
    return {"name": name, "status": DONE, "compression": {}, "weight_nbytes": nbytes, "evaluation": {"kl": float(kl)}}


def main() -> None:
    ours = [row for row in rows_of("sweep_off_grid") if row["row"] != "original"]
    rows = [measured(row["row"], row["weights, MB"], row["KL"]) for row in ours]
    rows += [
        measured(f"llama.cpp {row['type']}", row["file, MB"], row[KL])
        for row in rows_of("llama_types_off_grid")
        if row["importance matrix"] == "yes"
    ]
    drawn = picture({"model": "SmolLM2-135M, WikiText-2 valid", "rows": rows})
    assert drawn is not None, "every row has a KL"
    PICTURE.write_text(drawn, encoding="utf-8")
    print(f"{len(rows)} files: {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
