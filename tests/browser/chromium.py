"""Where Chromium is. It is installed when it is missing; where it cannot be had, the tests fail and are never skipped."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
INSTALL = (("apt-get", "update"), ("apt-get", "install", "-y", "--no-install-recommends", "chromium"))


def chromium() -> str:
    """The path of the program."""
    said = ""
    if not found() and os.geteuid() == 0 and shutil.which("apt-get"):
        for words in INSTALL:
            done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
            said += f"\n$ {' '.join(words)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
    if not (path := found()):
        pytest.fail(f"expected {' or '.join(NAMES)} on the PATH, or root and Debian's package index to install it from; there is neither. "
                    f"As root: apt-get install chromium{said}", pytrace=False)
    return path


def found() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)
