"""What a report measures against the original model."""

from dataclasses import dataclass

from halfplate.errors import HalfplateError

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain why the sky is blue.",
)


@dataclass(frozen=True)
class Measuring:
    """against: the original model. text: a text file, or None for text that the original generates; in windows of seq_len tokens.

    prompts: what both models are asked, new_tokens at most in an answer. bench_prompt, rounds: of the timing. Raises
    HalfplateError for numbers that cannot work.
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
