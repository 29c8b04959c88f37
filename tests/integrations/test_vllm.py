"""Checkpoints served by vLLM: the tokens of transformers with Halfplate. Run it in an environment of vLLM (docs/vllm.md): pytest -m vllm."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import halfplate
from halfplate.recipe import Recipe

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (docs/vllm.md)"),
]

ROOT = Path(__file__).resolve().parents[2]
# Heads of 32, because vLLM's attention on CPUs has none of 8.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
FULL = {
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": None,
}  # attention, of Qwen2, which has biases
RECIPES = {
    "wrapped": {"pattern": "2:4", "core_dtype": "int4", "block_size": 16, "wrapper_dtype": "int8", "share_wrappers": True},
    "tables": {"method": "rtn", "pattern": "dense", "core_dtype": "nl4", "block_size": 0, "embedding_dtype": "int8", "head_dtype": "int8"},
    "mixed": {"method": "magnitude", "pattern": "2:4", "core_dtype": "int8", "block_size": 0, "exclude": ["*.k_proj"]},
}  # fmt: skip
PROMPTS = [[5, 17, 40, 99], [33], [7, 8, 9, 10, 11, 12, 13, 14] * 8]
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "0"}
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables under which vLLM finds this checkout and its entry point, installed or not."""
    path = [str(ROOT / "src")]
    if "halfplate" not in {entry.name for entry in entry_points(group="vllm.general_plugins")}:
        found = re.search(r'"vllm\.general_plugins"\]\n(.*)\n', (ROOT / "pyproject.toml").read_text())
        folder = tmp_path_factory.mktemp("installed")
        (info := folder / "halfplate-0.dist-info").mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halfplate\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{found[1].replace(chr(34), '')}\n")
        path.append(str(folder))
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HALFPLATE_ACTIVATIONS": "float",  # else the tokens depend on how many requests run together
    }
    return os.environ | settings | {"PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory):
    """A function that compresses a tiny Llama, once for each of RECIPES."""
    made = {}

    def compressed(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            tied = name == "tables"
            kind, sizes = ("qwen2", SIZES | FULL) if name == "mixed" else ("llama", SIZES)
            model = tiny_model(kind, vocab_size=len(tiny_tokenizer), tie_word_embeddings=tied, **sizes)
            model.save_pretrained(folder / "model")
            tiny_tokenizer.save_pretrained(folder / "model")
            (folder / "text.txt").write_text("One day a small bird sat in a big tree and saw a red ball. " * 100)
            few = {"samples": 4, "seq_len": 32, "group_size": 32, "calibration": str(folder / "text.txt")}
            made[name] = folder / "out"
            halfplate.compress(str(folder / "model"), made[name], Recipe.from_mapping(few | RECIPES[name]), check=False)
        return made[name]

    return compressed


def served(folder, ranks, environment):
    command = [
        sys.executable,
        str(Path(__file__).with_name("serve_with_vllm.py")),
        str(folder),
        str(ranks),
        json.dumps(PROMPTS),
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def expected(folder):
    model, found = halfplate.load(folder, activations="float"), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize(
    ("name", "ranks"), [("wrapped", 1), ("tables", 1), ("mixed", 1), ("wrapped", 2), ("tables", 2)]
)
def test_greedy_tokens_are_those_of_transformers(name, ranks, checkpoint, environment):
    run = served(checkpoint(name), ranks, environment | (ONE_PROCESS if ranks == 1 else TWO_RANKS))
    tokens = re.search(r"^TOKENS (.*)$", run.stdout, re.MULTILINE)
    assert tokens, run.stdout[-2000:] + run.stderr[-4000:]
    assert json.loads(tokens[1]) == expected(checkpoint(name))


def test_a_damaged_checkpoint_is_refused_by_name(checkpoint, environment, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in checkpoint("mixed").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight_index"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    run = served(folder, 1, environment | ONE_PROCESS)
    assert run.returncode != 0
    assert "model.layers.1.mlp.down_proj.weight_index is missing" in run.stdout + run.stderr


def test_the_page_on_vllm_is_true(checkpoint, environment, tmp_path, capsys):
    """Its command serves, and its Python code streams what a request without streaming gets."""
    openai = pytest.importorskip("openai", reason="openai is not installed")
    page = (ROOT / "docs" / "vllm.md").read_text()
    port, (code,) = str(8001 + os.getpid() % 20000), re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    words = shlex.split(re.search(r"^vllm-env/bin/python (-m vllm.*)$", page, re.MULTILINE)[1])
    words[words.index("OUT")], words[words.index("8000")] = str(checkpoint("wrapped")), port
    few = ["--enforce-eager", "--max-model-len", "128", "--dtype", "float32", "--served-model-name", "OUT"]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, *words, *few], env=environment | ONE_PROCESS, stdout=log, stderr=log, start_new_session=True
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        exec(
            compile(
                code.replace("8000", port).replace("max_tokens=32", "max_tokens=8, temperature=0"), "vllm.md", "exec"
            ),
            {},
        )
        streamed = capsys.readouterr().out
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        whole = client.completions.create(model="OUT", prompt="One day", max_tokens=8, temperature=0)
        assert whole.choices[0].text == streamed != ""
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def wait_for(address, server, log):
    """Until the server answers; what it wrote if it ends before."""
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])
