"""examples/char_lm.py as a user runs it, here with tiny sizes.

What it does is tested in processes of its own. Wrong requests are tested in this process: see
scripts.error_of; test_a_wrong_request_ends_the_process shows that it is the same.
To add a wrong request, add a line to BAD_TEXT or BAD_OPTIONS.
"""

import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import scripts
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SCRIPT = scripts.EXAMPLES / "char_lm.py"
run = partial(scripts.run, SCRIPT)
error_of = partial(scripts.error_of, SCRIPT)
SIZES = ["--hidden=12", "--batch=4", "--chunk=8", "--steps=12", "--sample=20"]


def command(*options: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, options)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4000 characters with something to learn: words in random order, and a character seen once."""
    words = random.Random(0).choices(["one", "three", "seven", "zwölf", "\n"], k=1000)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(("☃" + " ".join(words))[:4000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run from beginning to end: its folder and what it printed."""
    out = tmp_path_factory.mktemp("finished")
    return out, run(*SIZES, "--text", text, "--out", out).stdout


def load(checkpoint: Path) -> dict:
    return torch.load(checkpoint, weights_only=True)


def assert_same_numbers(a: object, b: object, where: str = "checkpoint") -> None:
    """Bit for bit, all the way down; only the measured times may differ."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"}:
            assert_same_numbers(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same_numbers(*pair, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def test_end_to_end(finished: tuple[Path, str]) -> None:
    _, stdout = finished
    assert re.search(r"the layers agree: .* differ by at most \S+ nats, bound \S+", stdout)
    assert re.search(r"^torch.nn.RNN +\d\.\d+ ± ", stdout, re.MULTILINE)
    assert re.search(r"^torch_bptt.RNN +\d\.\d+ ± ", stdout, re.MULTILINE)
    assert re.search(r"quality: 0\.\d+ bits/char apart, within the standard error", stdout)
    assert re.search(r"speed-up: \d+\.\d\d times", stdout)
    assert "--- written by the model with torch_bptt.RNN" in stdout
    assert len(stdout.splitlines()) < 40, "a log must not be flooded"


def test_both_models_learn(finished: tuple[Path, str]) -> None:
    trainees = load(finished[0] / "checkpoint.pt")["trainees"]
    assert trainees.keys() == {"torch", "torch_bptt"}
    for trainee in trainees.values():
        assert len(trainee["losses"]) == len(trainee["seconds"]) == 12
        assert trainee["losses"][-1] < trainee["losses"][0]
        assert trainee["state"].shape == (1, 4, 12)


def test_curves_are_drawn(finished: tuple[Path, str]) -> None:
    from matplotlib import image

    pixels = image.imread(finished[0] / "curves.png")  # (height, width, 4), 0 to 1
    assert min(pixels.shape[:2]) > 800
    # Both curves must be there, in their colours: a line is at least some hundred pixels.
    for colour in ("a9b4c2", "c8102e", "e08a00", "1f6fb4"):
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        assert (abs(pixels[..., :3] - wanted).max(axis=-1) < 0.02).sum() > 300, colour


def test_the_standard_library_is_the_default_text(tmp_path: Path) -> None:
    stdout = run(*SIZES, "--out", tmp_path, "--no-plot", "--sample", 0).stdout
    learned = re.search(r"^standard library: ([\d,]+) characters to learn", stdout, re.MULTILINE)
    assert int(learned[1].replace(",", "")) > 1_000_000
    assert not (tmp_path / "curves.png").exists()
    assert "written by the model" not in stdout


def test_resume_equals_uninterrupted(
    text: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    halfway = tmp_path / "halfway.pt"
    options = [*SIZES, "--text", text, "--out", tmp_path]
    stdout = run(*options, "--checkpoint", halfway, "--stop-at", 5).stdout
    assert f"stopped at step 5 of 12; to go on: --resume {halfway}" in stdout
    assert len(load(halfway)["trainees"]["torch"]["losses"]) == 5
    resumed = run(*options, "--resume", halfway).stdout

    assert "the layers agree" in resumed, "the check comes after step 10, in the second part"
    assert_same_numbers(load(tmp_path / "checkpoint.pt"), load(finished[0] / "checkpoint.pt"))
    sample = re.compile(r"--- written.*---", re.DOTALL)
    assert sample.search(resumed)[0] == sample.search(finished[1])[0]


def test_ctrl_c_leaves_a_checkpoint_that_goes_on(text: Path, tmp_path: Path) -> None:
    options = [*SIZES, "--text", text, "--out", tmp_path, "--no-plot"]
    options += ["--steps", 100_000, "--checkpoint-every", 1]
    checkpoint = tmp_path / "checkpoint.pt"
    process = subprocess.Popen(
        command(*options),
        env=scripts.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (130, "")
    done = int(re.search(r"stopped at step (\d+) of 100000; to go on: --resume", stdout)[1])
    trainees = load(checkpoint)["trainees"]
    assert [len(trainee["losses"]) for trainee in trainees.values()] == [done, done]

    run(*options, "--resume", checkpoint, "--stop-at", done + 2)
    assert len(load(checkpoint)["trainees"]["torch"]["losses"]) == done + 2


@pytest.mark.parametrize("name", ["torch", "torch_bptt"])
def test_only_one(name: str, text: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    run(*SIZES, "--text", text, "--out", tmp_path, "--only", name)
    alone = load(tmp_path / "checkpoint.pt")["trainees"]
    assert alone.keys() == {name}
    assert_same_numbers(alone[name], load(finished[0] / "checkpoint.pt")["trainees"][name])
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_wrong_gradient_is_found(text: Path, tmp_path: Path) -> None:
    """The agreement check must be able to fail: one gradient of one layer has the wrong sign."""
    spoilt = (
        "import os, runpy, sys, torch_bptt\n"
        "class Spoilt(torch_bptt.RNN):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        self.bias_hh_l0.register_hook(lambda grad: -grad)\n"
        "torch_bptt.RNN = Spoilt\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path[0] = os.path.dirname(sys.argv[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    options = [*SIZES, "--text", text, "--out", tmp_path, "--no-plot"]
    done = subprocess.run(
        [sys.executable, "-c", spoilt, *command(*options)[1:]],
        env=scripts.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "the layers disagree: losses of the first 10 steps differ by" in done.stderr


def test_help() -> None:
    stdout = run("--help").stdout
    for option in ("text", "hidden", "layers", "steps", "batch", "chunk", "lr", "seed", "threads"):
        assert f"--{option} " in stdout
    for option in ("only", "out", "checkpoint", "resume", "sample", "temperature", "no-plot"):
        assert f"--{option}" in stdout


BAD_TEXT = {  # content of the file (None: there is none), what the message says
    "missing": (None, "cannot be read: No such file or directory"),
    "empty": (b"", "the file is empty"),
    "binary": (
        b"\x7fELF\x02\x01\x01\x00" * 1000,
        "must be text, got a binary file (zero byte at 7)",
    ),
    "latin-1": (b"caf\xe9 " * 1000, "must be UTF-8 text, got byte 0xe9 at 3"),
    "short": (b"a few words", "the text is too short: --batch 4 and --chunk 8 need 360 characters"),
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_bad_text(kind: str, tmp_path: Path) -> None:
    content, message = BAD_TEXT[kind]
    path = tmp_path / "input"
    if content is not None:
        path.write_bytes(content)
    assert message in error_of(*SIZES, "--text", path, "--out", tmp_path)


BAD_OPTIONS = {  # options, what the message says; FILE is a good text, FOLDER a folder
    "folder": ("--text FOLDER", "cannot be read: Is a directory"),
    "steps": ("--steps 0", "argument --steps: invalid count value: '0'"),
    "hidden": ("--hidden many", "argument --hidden: invalid count value: 'many'"),
    "lr": ("--lr nan", "argument --lr: invalid positive value: 'nan'"),
    "only": ("--only jax", "argument --only: invalid choice: 'jax'"),
    "unknown": ("--speed 9", "unrecognized arguments: --speed 9"),
    "checkpoint": ("--text FILE --out FOLDER --checkpoint FOLDER", "cannot be written"),
    "resume missing": ("--text FILE --resume FOLDER/none.pt", "cannot be read: No such file"),
    "resume text": ("--text FILE --resume FILE", "is not a checkpoint of this example"),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_bad_options(kind: str, text: Path, tmp_path: Path) -> None:
    options, message = BAD_OPTIONS[kind]
    options = options.replace("FILE", str(text)).replace("FOLDER", str(tmp_path)).split()
    assert message in error_of(*SIZES, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--hidden 16", "made with --hidden 12, this run has 16"),
        ("--only torch", "made with --only None, this run has torch"),
        ("--steps 24", "made with --steps 12, this run has 24"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    options: str,
    message: str,
    text: Path,
    finished: tuple[Path, str],
    tmp_path: Path,
) -> None:
    resume = ["--resume", finished[0] / "checkpoint.pt", "--out", tmp_path]
    assert message in error_of(*SIZES, "--text", text, *resume, *options.split())


def test_a_wrong_request_ends_the_process(tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    stderr = scripts.one_line(SCRIPT, run(*SIZES, "--text", path, code=2).stderr)
    assert stderr.endswith(f" --text {path}: cannot be read: No such file or directory\n")
