"""Seconds from a checkpoint to its first token, relative to reading its bytes: `python benchmarks/loading.py CHECKPOINT`.

Both start with the files out of the page cache, and alternate. Python, torch and transformers are imported before.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

LOADING = """
import json, sys, time
import torch, transformers.models.auto.modeling_auto, halfplate, halfplate.checkpoint.read, halfplate.runtime.prepare
torch.set_num_threads(int(sys.argv[2]))
from halfplate.runtime import greedy
sys.stdin.readline()
start = time.perf_counter()
model = halfplate.load(sys.argv[1])
loaded = time.perf_counter() - start
with torch.no_grad():
    greedy(model, torch.arange(5, 13)[None], 1)
print(json.dumps({"load": loaded, "first": time.perf_counter() - start}))
"""


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> float:
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    files = sorted(options.checkpoint.glob("*.safetensors"))
    rounds = []
    for _ in range(options.rounds):
        command = [sys.executable, "-c", LOADING, str(options.checkpoint), str(options.threads)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(20)  # it imports meanwhile
        forget(files)
        bytes_cold = read(files)
        bytes_warm = read(files)
        forget(files)
        found = json.loads(process.communicate("\n")[0])
        rounds.append({"read": bytes_cold, "read from memory": bytes_warm, **found})
    middle = {name: median(one[name] for one in rounds) for name in rounds[0]}
    nbytes = sum(file.stat().st_size for file in files)
    print(f"{nbytes / 1e6:.1f} MB, medians of {options.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for name, seconds in middle.items():
        print(f"{name}: {seconds:.2f} s, {seconds / middle['read']:.2f} x reading")


if __name__ == "__main__":
    main()
