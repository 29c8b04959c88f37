"""Everything that Halfplate does on a GPU, checked and measured in one run of a few minutes.

    python benchmarks/gpu.py --minutes 8 --out results          on a CUDA device
    python benchmarks/gpu.py --device cpu --tiny --minutes 2    the script itself, on tiny shapes

Correctness comes first, then the figures. What is found is written at once, as JSON lines (gpu.jsonl) and as text (gpu.txt) in
the folder `--out`, so that a run that is cut off counts too. A section that lacks something says so, and the others run. It
needs torch and transformers, and Halfplate's sources beside it; nothing is installed, nothing is fetched. The exit status is 0
where every check passed, 1 where one failed, 3 where a section hung.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

BEGIN = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BUILD_SECONDS = 120


def build_native(out: Path) -> "subprocess.Popen[bytes] | str":
    """Start to build the CPU kernels, which the CPU's figures need, or say why not."""
    if (ROOT / "src" / "halfplate" / "kernels" / "libhalfplate.so").exists():
        return "the CPU kernels were built before"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        return "no C++ compiler: the CPU runs on its torch path"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    with (out / "build.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"CXX": compiler})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="after which the run ends (default 8)")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")), help="folder of the results"
    )
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu to try the script")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a test of the script")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections alone")
    parser.add_argument("--list", action="store_true", help="name the sections and end")
    parser.add_argument("--after", metavar="SECTION", help=argparse.SUPPRESS)  # go on in a new process
    return parser.parse_args()


def main() -> int:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    built = build_native(options.out) if options.after is None and not options.list else ""
    import torch
    from gpu_record import Record
    from gpu_sections import sections
    from gpu_session import Session, run_sections
    from transformers.utils import logging

    # Bars of progress would fill the log of a run that nobody watches.
    logging.disable_progress_bar()
    plan = sections()
    if options.list:
        print("\n".join(f"{section.name:16} {section.run.__doc__.splitlines()[0]}" for section in plan))
        return 0
    names = [section.name for section in plan]
    unknown = sorted({*(options.only or []), *([options.after] if options.after else [])} - {*names})
    if unknown:
        print(f"--only {unknown[0]} is no section; there are {', '.join(names)}", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA GPU; try the script with --device cpu --tiny", file=sys.stderr)
        return 2
    record = Record(options.out, fresh=options.after is None)
    if not isinstance(built, str):
        try:
            built = f"the CPU kernels were built (exit status {built.wait(BUILD_SECONDS)}, build.log)"
        except subprocess.TimeoutExpired:
            built.kill()
            built = f"the CPU kernels were not built within {BUILD_SECONDS} s"
    if built:
        record.write("note", f"{built} [{time.monotonic() - BEGIN:.1f} s since the start]")
    end = BEGIN + 60 * options.minutes
    session = Session(record, torch.device(options.device), options.tiny, end)
    todo = [section for section in plan if options.only is None or section.name in options.only]
    if options.after is not None:
        todo = [section for section in todo if names.index(section.name) > names.index(options.after)]
    broken = run_sections(session, todo)
    if broken is not None and any(names.index(section.name) > names.index(broken) for section in todo):
        # Only a new process gets a new CUDA context.
        minutes = (end - time.monotonic()) / 60
        again = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--minutes",
            f"{minutes:.3f}",
            "--out",
            str(options.out),
        ]
        again += ["--device", options.device, "--after", broken]
        again += ["--tiny"] if options.tiny else []
        again += ["--only", *options.only] if options.only else []
        os.execv(sys.executable, again)
    record.say(record.summary())
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
