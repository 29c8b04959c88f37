"""Settings of the measurements against the original model."""

from dataclasses import dataclass

from halfplate.errors import HalfplateError

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain why the sky is blue.",
)


@dataclass(frozen=True)
class Measuring:
    """Settings of the measurements of a report.

    against: the original model.
    text: a text file, or None for text that the original generates.
    windows, seq_len: number of windows and their length in tokens.
    prompts, new_tokens: prompts for both models, and the maximum length of an answer.
    bench_prompt, rounds: of the speed measurement.
    Raises HalfplateError for invalid numbers.
    """

    against: str
    text: str | None = None
    windows: int = 16
    seq_len: int = 256
    prompts: tuple[str, ...] = PROMPTS
    new_tokens: int = 48
    bench_prompt: int = 64
    rounds: int = 3

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("seq_len", 2), ("new_tokens", 2), ("bench_prompt", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise HalfplateError(f"{name}={getattr(self, name)} is too few, expected at least {least}")
