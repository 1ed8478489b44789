"""`tubelet VERB` as a process of its own, to be watched and killed."""

from __future__ import annotations

import os
import subprocess
import sys


def start_tubelet(*arguments: str) -> subprocess.Popen[str]:
    """`tubelet ARGUMENTS` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from tubelet.cli.main import main; sys.exit(main())", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def run_tubelet(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `tubelet ARGUMENTS`."""
    process = start_tubelet(*arguments)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err
