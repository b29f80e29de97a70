"""Builds, tests and measures on a machine with an NVIDIA GPU, with one command and no network.

    make gpu-check                                         everything, about ten minutes
    python benchmarks/gpu_check.py --parts build,tests     some of it
    python benchmarks/gpu_check.py --dry-run               what would be done, and how long it takes

The parts, each of one or several commands with a time of its own:

    build      the extension in place, for the GPU that is there
    tests      the tests with --device cuda
    paths      those of the kernels on each of the paths, wherever it can be taken
    cudnn      torch.nn.RNN alone; needs torch and nothing that is built here
    compare    torch_bptt.RNN against it
    constants  latencies and limits of the device

and, only where they are asked for:

    crossovers torch_bptt.RNN on each of the paths: from where on which is the fastest
    sanitizer  small cases under the four tools of compute-sanitizer

A command that runs over its time is ended with all that it started, and its rows and its log are
kept. Files go to --out: $OUT, or benchmarks/results/DEVICE. The exit status is 1 if any part
failed.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Seconds for each part; all but the last two take less than ten minutes together.
SECONDS = {
    "build": 110, "tests": 140, "paths": 100, "cudnn": 50, "compare": 160, "constants": 35,
    "crossovers": 240, "sanitizer": 240,
}  # fmt: skip
PARTS = tuple(SECONDS)
DEFAULT = PARTS[:-2]
LAYERS = ("cudnn", "compare", "crossovers")  # parts with rows of gpu.layers
PATHS = ("step", "block", "cluster", "grid", "gemm")
# In runs of their own, the first with most of what can be wrong.
TESTS = (
    (
        "test_cuda.py",
        "test_kernels.py",
        "test_rnn_module.py",
        "test_options.py",
        "test_lengths_reset.py",
        "test_packed.py",
        "test_pytorch_samples.py",
    ),
    ("test_autograd.py",),
)
KERNELS = "every_size or integers or every_path or same_bits or replays or never_comes or spreads"
# Said where it is left out.
NEEDED = {"test_pytorch_samples.py": "expecttest"}
GRACE = 5  # seconds between the request to stop and the end
STARTING = 10  # seconds that a measuring program needs to start and to finish its last row
BOTH = ("torch.nn.RNN", "torch_bptt.RNN")
VARIANTS = (*BOTH, "torch.nn.RNN in a graph", "torch_bptt.RNN in a graph")
VARIANTS += ("torch_bptt.RNN with resets",)
SECOND = ("torch.nn.RNN without cuDNN", "torch_bptt.RNN")


class Step(NamedTuple):
    """A command of a part, with the seconds after which it is ended."""

    command: tuple[str, ...]
    seconds: float
    measures: bool = False  # and knows --seconds, --out, --commit and --dry-run


def here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def tests_that_can_run(names: tuple[str, ...]) -> list[str]:
    found = []
    for name in names:
        if name in NEEDED and not here(NEEDED[name]):
            print(f"tests: {name} is left out: {NEEDED[name]} is not installed")
        else:
            found.append(f"tests/{name}")
    return found


def pytest(*arguments: str) -> tuple[str, ...]:
    """With no plugin but pytest-xdist, where it is there."""
    plugins = ["-p", "no:cacheprovider"]
    plugins += ["-p", "xdist.plugin"] if here("xdist") else []
    shown = ["-q", "--tb=short", "--maxfail=60"]
    return (sys.executable, "-m", "pytest", "--device", "cuda", *shown, *plugins, *arguments)


def forced(path: str, command: tuple[str, ...]) -> tuple[str, ...]:
    return ("env", f"TORCH_BPTT_CUDA_PATH={path}", *command)


def layers(*arguments: str, implementations: tuple[str, ...]) -> tuple[str, ...]:
    chosen = ("--implementations", *implementations)
    return (sys.executable, "-m", "gpu.layers", *arguments, *chosen)


def steps(part: str, seconds: float, out: Path) -> list[Step]:
    """The commands of a part, with what each may take of its seconds."""
    if part == "build":
        build = (sys.executable, "setup.py", "build_ext", "--inplace")
        return [Step(build, seconds), Step((sys.executable, "-m", "gpu.built", str(out)), 30)]
    # Several processes, as small kernels mostly wait for theirs.
    workers = ["-n", str(max(1, min(6, (os.cpu_count() or 1) - 2)))] if here("xdist") else []
    if part == "paths":
        some = pytest(*workers, "tests/test_cuda.py", "tests/test_kernels.py", "-k", KERNELS)
        return [Step(forced(path, some), seconds / len(PATHS)) for path in PATHS]
    if part == "crossovers":
        sizes = ("--groups", "headline", "middle", "edges", "large-batch", "large-state")
        maths = ("--maths", "bfloat16", "tf32", "float32")
        some = layers(*sizes, *maths, implementations=BOTH[1:])
        return [Step(forced(path, some), seconds / len(PATHS), measures=True) for path in PATHS]
    if part == "tests":
        first, second = (pytest(*workers, *tests_that_can_run(names)) for names in TESTS)
        return [Step(first, 0.6 * seconds), Step(second, 0.4 * seconds)]
    if part == "sanitizer":
        small = pytest("tests/test_cuda.py", "-k", "every_path")
        tools = ("memcheck", "racecheck", "synccheck", "initcheck")
        # Each tensor an allocation of its own: a tool sees a step beyond it only then.
        prefix = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
        prefix += ("compute-sanitizer", "--error-exitcode", "9", "--tool")
        return [Step((*prefix, tool, *small), seconds / len(tools)) for tool in tools]
    if part == "cudnn":
        command = layers("--kernels", implementations=BOTH[:1])
        return [Step(command, seconds, measures=True)]
    if part == "compare":
        headline = ("--groups", "headline")
        return [
            Step(layers("--check", *headline, implementations=VARIANTS), 0.25 * seconds, True),
            Step(
                layers("--check", *headline, "--passes", "double backward", implementations=SECOND),
                0.15 * seconds,
                True,
            ),
            Step(layers("--check", "--kernels", implementations=BOTH), 0.6 * seconds, True),
        ]
    return [Step((sys.executable, "-m", "gpu.constants"), seconds, measures=True)]


def environment() -> dict[str, str]:
    """Nothing but the GPU that is there is compiled for; its kernels use what only it has."""
    own = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep),
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a plugin that warns would be an error
    }
    own.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
    own.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    return own


def run(command: tuple[str, ...], seconds: float, log: Path) -> int:
    """The exit status, 124 after the time; the output goes to the screen and to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(f"\n$ {shlex.join(command)}\n")
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError as error:
            print(f"{error.strerror}: {error.filename}")
            file.write(f"{error}\n")
            return 127

        def end() -> None:
            """As Ctrl-C does, upon which pytest says what failed; then all that is still there."""
            late.set()
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        late = threading.Event()
        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            with process:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    file.write(line)
                    file.flush()
            status = process.returncode
        finally:
            timer.cancel()
        return 124 if late.is_set() else status


def device_name() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no-gpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(DEFAULT), help="(%(default)s)")
    parser.add_argument(
        "--seconds",
        default="",
        help="for some parts, as in build=200,compare=100; else "
        + ",".join(f"{part}={seconds}" for part, seconds in SECONDS.items()),
    )
    parser.add_argument("--out", type=Path, help="the folder for CSV files and logs")
    parser.add_argument("--commit", default="", help="what to write into the rows")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"--parts: expected some of {','.join(PARTS)}, got {part!r}")
    seconds = dict(SECONDS)
    for setting in filter(None, options.seconds.split(",")):
        part, _, value = setting.partition("=")
        if part not in PARTS or not re.fullmatch(r"\d+", value):
            parser.error(f"--seconds: expected PART=SECONDS, got {setting!r}")
        seconds[part] = int(value)
    given = os.environ.get("OUT")
    out = options.out or (Path(given) if given else ROOT / "benchmarks/results" / device_name())

    begin, results = time.monotonic(), {}
    print(f"{sum(seconds[part] for part in parts)} s at most, files in {out}")
    for part in parts:
        for step in steps(part, seconds[part], out):
            command = step.command
            if step.measures:
                command += ("--out", str(out / f"{part}.csv"), "--commit", options.commit)
                command += ("--seconds", str(max(1, int(step.seconds - STARTING))))
            print(f"\n==> {part}, {step.seconds:.0f} s at most: {shlex.join(command)}", flush=True)
            if options.dry_run and not step.measures:
                continue
            if options.dry_run:
                subprocess.run([*command, "--dry-run"], cwd=ROOT, env=environment(), check=True)
                continue
            started = time.monotonic()
            status = run(command, step.seconds, out / f"{part}.log")
            took = time.monotonic() - started
            words = {0: "passed", 124: "ENDED, as its time was over,"}
            words = words.get(status, f"FAILED ({status})")
            results.setdefault(part, []).append(f"{words} after {took:.0f} s")
    if options.dry_run:
        return 0
    measured = [str(out / f"{part}.csv") for part in LAYERS if part in parts]
    measured = [path for path in measured if Path(path).exists()]
    if measured:
        run((sys.executable, "-m", "gpu.report", *measured), 60, out / "summary.txt")
    print(f"\n{time.monotonic() - begin:.0f} s in all, files in {out}")
    for part, words in results.items():
        print(f"  {part:<10} {'; '.join(words)}")
    return int(any("passed" not in word for words in results.values() for word in words))


if __name__ == "__main__":
    sys.exit(main())
