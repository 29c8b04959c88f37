"""Fixtures that tests of several folders share: tiny random-weight models, a tiny model folder, stories260K."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Read when torch is imported, here and in every process that a test starts, as `_one_thread` says.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halfplate.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
EXAMPLES = ROOT / "examples" / "extensions"

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would every command that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# What differs from SIZES; sliding windows are shorter than the sequences of the tests, so that they matter.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
        "bos_token_id": None,
    },
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 5},
    "gemma2": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 5,
        "query_pre_attn_scalar": 8,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": 5},
}

# The methods without a core, with options under which they take least.
FACTORS: dict[str, dict[str, Any]] = {
    "svd": {},
    "bitstack": {},
    "rocket": {},
    "cospadi": {"iterations": 1},
    "monarch": {},
    "gqsa": {"kept": 0.5},
}
TEXT = (
    "One day a small bird sat in a big tree. The bird saw a red ball near the house, and it wanted to play. "
    "Tom and Mia came out of the house. They saw the bird and the ball, and they were happy. "
    "In 2024 they played all day; then it was dark, and they went home to sleep. "
)


# Files all of whose tests are slow: wheels, the site, the browser, Ray, programs, sanitizers, sweeps over architectures. Elsewhere single tests are marked.
SLOW = (
    "benchmarks/test_gpu.py",
    "checkpoint/test_architectures.py",
    "cli/test_serve.py",
    "engines/test_cluster.py",
    "kernels/test_export.py",
    "kernels/test_native_self_test.py",
    "kernels/test_triton_sweep.py",
    "report/test_browser.py",
    "stress/",
    "test_documents.py",
    "test_install.py",
    "test_site.py",
)

# Files and folders whose tests take long for the number of their parameters: the quick tier has each test with its first ones alone.
SAMPLED = (
    "attacks/",
    "calibration/test_self_text.py",
    "calibration/test_stream.py",
    "checkpoint/test_damaged_files.py",
    "checkpoint/test_format_document.py",
    "checkpoint/test_round_trip.py",
    "cli/test_compress_verb.py",
    "cli/test_ratios.py",
    "cli/test_refusals.py",
    "compression/",
    "kernels/",
    "methods/test_methods.py",
    "models/",
    "recovery/",
    "report/test_every_method.py",
    "runtime/test_architectures.py",
    "runtime/test_decoder.py",
    "solvers/test_armor_gram.py",
    "solvers/test_armor_sweep.py",
    "test_shipped_recipes.py",
    "transforms/",
)

# Files of the longest tests. They run first: one that starts last keeps one worker busy while the others have nothing left.
LONGEST = (
    "engines/test_cluster.py",
    "kernels/test_native_self_test.py",
    "stress/test_faults.py",
    "test_documents.py",
    "test_install.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the quick tier, `-m "not slow"`, leaves out of the files of SLOW and SAMPLED, and put those of LONGEST first."""
    inside = {item: item.path.relative_to(TESTS).as_posix() for item in items if item.path.is_relative_to(TESTS)}
    seen = set()
    for item, file in inside.items():
        test = file, getattr(item, "originalname", item.name)
        if file.startswith(SLOW) or (file.startswith(SAMPLED) and test in seen):
            item.add_marker(pytest.mark.slow)
        elif item.get_closest_marker("slow") is None:
            seen.add(test)
    items.sort(key=lambda item: inside.get(item) not in LONGEST)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Matrices this small run faster on one thread, and equally on every machine."""
    torch.set_num_threads(1)


def build_model(architecture: str = "llama", seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A model of `architecture` (a model_type of transformers) with seeded random weights, norms and biases included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **(SIZES | ARCHITECTURES.get(architecture, {}) | config_overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def build_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on TEXT: pad 0, <s> 1 (written before every text), </s> 2; no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """The factory `tiny_model(architecture="llama", seed=0, **config_overrides)`."""
    return build_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 320 tokens, as in `tiny_folder`."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder_once(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A Hugging Face folder with a tiny Llama (vocabulary 320, 2 blocks, hidden 32, ffn 48, fp32) and its tokenizer, to read."""
    folder = tmp_path_factory.mktemp("models") / "tiny_llama"
    build_model("llama", vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_folder_once: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(tiny_folder_once, tmp_path / "tiny_llama"))


@pytest.fixture(scope="session")
def compressed_once(tiny_folder_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """`compressed_once(recipe)` is the model of `tiny_folder_once` compressed by it, to read or to copy; each recipe is carried out once."""
    made: dict[str, Path] = {}

    def make(recipe: Recipe) -> Path:
        from halfplate.compression.compress import compress

        key = repr(recipe)
        if key not in made:
            out = tmp_path_factory.mktemp("compressed") / "out"
            compress(str(tiny_folder_once), out, recipe)
            made[key] = out
        return made[key]

    return make


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """The folder of the real trained model stories260K; skips where it is absent."""
    folder = Path(os.environ.get("HALFPLATE_SHARED") or ROOT.parent / "shared") / "models" / "stories260K"
    if not (folder / "config.json").is_file():
        pytest.skip(f"the model stories260K is not at {folder}")
    return folder


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI, fail where more than a tenth of the tests skip: a skipped test shows nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("CI") or exitstatus != pytest.ExitCode.OK:
        return
    skipped, passed = (len(reporter.stats.get(outcome, [])) for outcome in ("skipped", "passed"))
    if skipped > 0.1 * (skipped + passed):
        reporter.write_line(f"{skipped} of {skipped + passed} tests skipped, expected at most a tenth")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def browser() -> Any:
    """Chromium without a window, driven by selenium; skips where either is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and its driver are not installed (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def open_page(browser: Any) -> Callable[..., Any]:
    """`open_page(page, width=1280, scheme="light")` shows a file or an address and returns the browser."""

    def show(page: Path | str, width: int = 1280, scheme: str = "light", media: str = "screen") -> Any:
        browser.get_log("browser")
        browser.get_log("performance")
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page if isinstance(page, str) else page.resolve().as_uri())
        return browser

    return show


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`install(name, version, points, modules)` puts a distribution on the path, as a wheel of pure Python would."""
    from halfplate.registry import installed

    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    loaded = set(sys.modules)

    def put(name: str, version: str = "1.0", points: Sequence[tuple[str, str]] = (), **modules: str) -> None:
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        groups: dict[str, list[str]] = {}
        for group, line in points:
            groups.setdefault(group, []).append(line)
        text = "\n".join(f"[{group}]\n" + "\n".join(lines) for group, lines in groups.items())
        (info / "entry_points.txt").write_text(text)
        for module, code in modules.items():
            (site / f"{module}.py").write_text(code)
        installed.cache_clear()

    yield put
    installed.cache_clear()
    for module in set(sys.modules) - loaded:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(site)):
            del sys.modules[module]


@pytest.fixture
def examples(install: Callable[..., None]) -> Iterator[None]:
    """The example package, registered as its pyproject.toml says."""
    sys.path.insert(0, str(EXAMPLES))
    points = re.findall(
        r'^\[project.entry-points."(.*?)"\]\n((?:[^\[\n].*\n)+)',
        (EXAMPLES / "pyproject.toml").read_text(),
        re.MULTILINE,
    )
    lines = [(group, line.replace('"', "")) for group, rest in points for line in rest.strip().splitlines()]
    install("halfplate-extensions", points=lines)
    yield
    sys.path.remove(str(EXAMPLES))
