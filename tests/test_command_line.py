"""examples/command_line.py, and that the scripts that import it ask it before they work."""

import importlib.util
import re
import sys
from pathlib import Path

import command_line
import pytest
import scripts

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")


def packages(path: Path) -> list[str]:
    """All that a script asks for before it works."""
    lists = re.findall(r"^ *require\(.*(\[.*?\])\)$", path.read_text(), re.MULTILINE)
    return re.findall(r'"(\w+)"', lists[0]) if lists else []


# Those whose packages are there: `make test` has no Lightning and no TorchRL.
SCRIPTS = {
    path.stem: packages(path)
    for path in sorted(scripts.EXAMPLES.glob("*.py"))
    if "from command_line import" in path.read_text()
    and all(importlib.util.find_spec(package) for package in packages(path))
}


@pytest.mark.parametrize(
    ("script", "package"), [(script, package) for script in SCRIPTS for package in SCRIPTS[script]]
)
def test_a_missing_package_is_named(
    script: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != package and find(name))
    (tmp_path / "file").touch()
    # No folder can be made there: a script that did not look would not train, but end with that.
    error = scripts.error_of(scripts.EXAMPLES / f"{script}.py", "--out", tmp_path / "file" / "out")
    assert error.endswith(f" this example needs {package}: pip install {package}\n")


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if '"--out"' in (scripts.EXAMPLES / f"{s}.py").read_text()]
)
def test_a_folder_that_cannot_be_made_is_named(script: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    error = scripts.error_of(scripts.EXAMPLES / f"{script}.py", "--out", out)
    assert error.endswith(f" cannot make the folder {out}: Not a directory\n")


@pytest.mark.parametrize(
    ("number", "good", "bad"),
    [
        (command_line.natural, {"0": 0, "7": 7, "2147483647": 2**31 - 1}, ["-1", "2147483648"]),
        (command_line.count, {"1": 1, "2147483647": 2**31 - 1}, ["0", "-1", "2147483648", "1.5"]),
        (command_line.positive, {"1e-3": 1e-3, "2": 2.0}, ["0", "-1", "inf", "nan", "many"]),
    ],
)
def test_numbers(number, good, bad) -> None:
    for text, value in good.items():
        assert number(text) == value
        assert type(number(text)) is type(value)
    for text in bad:
        with pytest.raises(ValueError):  # noqa: PT011 - argparse wants no message
            number(text)


def test_a_folder_that_is_there_is_taken(tmp_path: Path) -> None:
    for _ in range(2):
        command_line.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    def wrong() -> int:
        command_line.fail("the layers disagree", 1)

    monkeypatch.setattr(sys, "argv", ["folder/script.py", "--quick"])
    for main, code, stderr in (
        (lambda: 0, 0, ""),
        (lambda: 3, 3, ""),
        (wrong, 1, "script.py: error: the layers disagree\n"),
        (interrupted, 130, "\nscript.py: interrupted\n"),
    ):
        with pytest.raises(SystemExit) as exit:
            command_line.run(main)
        assert exit.value.code == code
        assert capsys.readouterr().err == stderr
