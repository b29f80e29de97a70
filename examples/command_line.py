"""What the command lines of the examples have in common; nothing here is about networks.

Errors are one line that begins with the script's name, without a traceback. Exit codes: 0 done,
1 what is computed is wrong, 2 the request is wrong, 130 stopped by Ctrl-C.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line. Exit code 2: the request is wrong; 1: what is computed is."""
    print(f"{script_name()}: error: {message}", file=sys.stderr)
    sys.exit(code)


def script_name() -> str:
    return Path(sys.argv[0]).name


# --- options --------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One that ends with one line where argparse prints its usage first."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


# Types of options. argparse puts their names into messages: "invalid count value: '0'".


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if not 0 <= int(text) < 2**31:
        raise ValueError
    return int(text)


def count(text: str) -> int:
    """A whole number from 1 on."""
    if natural(text) == 0:
        raise ValueError
    return int(text)


def positive(text: str) -> float:
    """A number above zero, neither infinite nor nan."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


# --- before and around the work -------------------------------------------------------------------


def require(packages: list[str]) -> None:
    """Fail with what to install if a package is not there, before any work is done."""
    for package in packages:
        if not importlib.util.find_spec(package):
            fail(f"this example needs {package}: pip install {package}")


def make_folder(path: Path) -> None:
    """Make a folder, with all above it, unless it is there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {error.filename}: {error.strerror}")


def run(main: Callable[[], int]) -> NoReturn:
    """End with the exit code that main returns, or at Ctrl-C with one line and 130."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"\n{script_name()}: interrupted", file=sys.stderr)
        sys.exit(130)
