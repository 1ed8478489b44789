"""kill -9 at any point, run again: the store equals one that was never interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# A fresh process that forks once per point: no thread of another test is alive in it when it forks.
DRIVER = """
import os, signal, sys
from pathlib import Path
import scripted
from tubelet_store import shard_writer
from tubelet_store.storage import local

def events(owner, name, on_event):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        on_event()
        result = original(*args, **kwargs)
        on_event()
        return result
    setattr(owner, name, wrapped)

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

def write_until(point, url, count_file=None):
    seen = 0
    def on_event():
        nonlocal seen
        seen += 1
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)
    for name in ("replace", "create", "publish"):
        events(local.LocalRoot, name, on_event)
    events(os, "fsync", on_event)
    events(shard_writer._ObjectFile, "_write", on_event)
    scripted.write_all(url)
    if count_file:
        Path(count_file).write_text(str(seen))

folder = Path(sys.argv[1])
assert in_child(lambda: write_until(0, str(folder / "whole"), folder / "count")) == 0
expected, total = scripted.fingerprint(folder / "whole"), int((folder / "count").read_text())
# The first and the last events, and points spread evenly between them.
spread = range(1, total + 1, max(1, total // int(sys.argv[2])))
for point in sorted({1, 2, *spread, total - 2, total - 1, total}):
    url = folder / f"killed-at-{point}"
    killed = in_child(lambda: write_until(point, str(url)))
    resumed = in_child(lambda: scripted.write_all(str(url)))
    left_over = (url / ".tmp").exists()
    same = scripted.fingerprint(url) == expected
    if (killed, resumed, left_over, same) != (-9, 0, False, True):
        print(f"point {point} of {total}: killed {killed}, resumed {resumed}, scratch {left_over}, same {same}")
print("points done")
"""


def test_a_killed_and_repeated_run_equals_an_uninterrupted_one(tmp_path):
    # 1000 tries every point there is (minutes).
    points = os.environ.get("TUBELET_CRASH_POINTS", "16")
    tests = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, str(tmp_path), points],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
    )
    assert (result.stdout, result.returncode) == ("points done\n", 0), result.stdout + result.stderr
