"""What `gpu.py` writes down: JSON lines and text as they come, and the table of goals made from them at the end."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS, TEXT = "gpu.jsonl", "gpu.txt"


@dataclass(frozen=True)
class Goal:
    """One figure of the table: what is measured, its unit and the least or the greatest value that will do."""

    what: str
    bound: float
    unit: str
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    @property
    def text(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}{self.unit}"


GOALS = {
    "solve_4096": Goal("solve 4096 × 4096, full Gram, 20 iterations, against the CPU", 20, "×"),
    "solve_14336": Goal("solve 4096 × 14336, full Gram, 20 iterations, against the CPU", 20, "×"),
    "compress_8b": Goal("compress an 8B Llama shape, extrapolated", 30, " min", at_most=True),
    "decode_bf16_4096": Goal("linear 4096 × 4096, batch 1: A·S·B bf16 against dense bf16", 1.5, "×"),
    "decode_bf16_14336": Goal("linear 14336 × 4096, batch 1: A·S·B bf16 against dense bf16", 1.5, "×"),
    "decode_int4_4096": Goal("linear 4096 × 4096, batch 1: int4 2:4 with wrappers against dense bf16", 4, "×"),
    "decode_int4_14336": Goal("linear 14336 × 4096, batch 1: int4 2:4 with wrappers against dense bf16", 4, "×"),
    "bandwidth_int4_14336": Goal("share of memory bandwidth of the last", 0.7, ""),
    "prefill_4096": Goal("linear 4096 × 4096, 4096 tokens: A·S·B bf16 against dense bf16", 1.25, "×"),
    "prefill_14336": Goal("linear 14336 × 4096, 4096 tokens: A·S·B bf16 against dense bf16", 1.25, "×"),
    "model_1b_bf16": Goal("decode of a 1B shape, batch 1: bf16 2:4 against dense bf16", 1.4, "×"),
    "model_8b_bf16": Goal("decode of an 8B shape, batch 1: bf16 2:4 against dense bf16", 1.4, "×"),
    "model_1b_int4": Goal("decode of a 1B shape, batch 1: int4 2:4 against dense bf16", 3, "×"),
    "model_8b_int4": Goal("decode of an 8B shape, batch 1: int4 2:4 against dense bf16", 3, "×"),
}


class Record:
    """The two files below the folder `out`; every entry reaches the disk before the next step begins."""

    def __init__(self, out: Path, fresh: bool = True) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.lines, self.text = out / RESULTS, out / TEXT
        if fresh:
            self.lines.write_text("")
            self.text.write_text("")
        self.section = ""
        self.start = time.monotonic()

    def write(self, kind: str, text: str, **facts: Any) -> None:
        """One entry. kind: `device`, `check`, `measured`, `goal`, `section` or `note`."""
        entry = {"kind": kind, "section": self.section, "text": text, **facts}
        entry["at"] = round(time.monotonic() - self.start, 2)
        with self.lines.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.say(f"{kind:8} {text}")

    def say(self, line: str) -> None:
        """A line for people."""
        with self.text.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def check(self, name: str, passed: bool, detail: str = "") -> None:
        """Whether something is right."""
        said = f"{'ok' if passed else 'FAILED'}: {name}" + (f" ({detail})" if detail else "")
        self.write("check", said, name=name, passed=passed, detail=detail)

    def absent(self, name: str, why: str) -> None:
        """Something that does not exist yet or lacks a package: neither right nor wrong."""
        self.write("check", f"not there: {name} ({why})", name=name, passed=None, detail=why)

    def measured(self, name: str, value: float, unit: str, **facts: Any) -> None:
        """One figure."""
        details = ", ".join(f"{key} {fact}" for key, fact in facts.items())
        said = f"{name}: {value:.4g} {unit}" + (f" ({details})" if details else "")
        self.write("measured", said, name=name, value=value, unit=unit, **facts)

    def goal(self, key: str, value: float, how: str = "") -> None:
        """The figure of a goal. how: what the figure leaves out, such as an extrapolation."""
        goal = GOALS[key]
        said = f"{goal.what}: {value:.3g}{goal.unit}, goal {goal.text}" + (f" ({how})" if how else "")
        self.write("goal", said, name=key, value=value, met=goal.met(value), how=how)

    def summary(self) -> str:
        """The whole record as one table of goals, what failed and what did not run; `gpu.py` ends with it."""
        entries = list(read(self.lines))
        goals = {entry["name"]: entry for entry in entries if entry["kind"] == "goal"}
        lines = ["", "goal | wanted | measured | met", "--- | --- | --- | ---"]
        for key, goal in GOALS.items():
            entry = goals.get(key)
            if entry is None:
                lines.append(f"{goal.what} | {goal.text} | not measured |")
            else:
                how = f" ({entry['how']})" if entry["how"] else ""
                met = "yes" if entry["met"] else "no"
                lines.append(f"{goal.what} | {goal.text} | {entry['value']:.3g}{goal.unit}{how} | {met}")
        checks = [entry for entry in entries if entry["kind"] == "check"]
        counts = [sum(entry["passed"] is state for entry in checks) for state in (True, False, None)]
        lines += ["", "{} checks passed, {} failed, {} have nothing to check yet".format(*counts)]
        lines += [entry["text"] for entry in checks if entry["passed"] is False]
        lines += [entry["text"] for entry in entries if entry["kind"] == "section" and entry["state"] != "done"]
        return "\n".join(lines)

    @property
    def failed(self) -> bool:
        """Whether a check failed or a section ended in an error."""
        return any(
            (entry["kind"] == "check" and entry["passed"] is False)
            or (entry["kind"] == "section" and entry["state"] == "error")
            for entry in read(self.lines)
        )


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a file of results; a last line that was cut off is left out."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
