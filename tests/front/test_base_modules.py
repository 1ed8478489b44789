"""Concurrency, retries, locks and devices: what every package builds on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tubelet import retry as retry_module
from tubelet.concurrency import in_parallel, prefetched
from tubelet.device import choose_device
from tubelet.durable_files import locked, replace_file
from tubelet.errors import StoreUnreachable, TubeletError
from tubelet.formats import human_bytes, human_seconds, number
from tubelet.retry import retry, retry_while_unreachable


def _counted(limit: int, taken: list[int]) -> Iterator[int]:
    for item in range(limit):
        taken.append(item)
        yield item


def test_prefetched_items_come_in_order_a_bounded_number_ahead() -> None:
    taken: list[int] = []
    items = prefetched(_counted(100, taken), 3, "test")
    for place, item in enumerate(items):
        assert item == place
        # One being made, three ready, one handed over and one waiting for room.
        assert len(taken) <= place + 6
    assert taken == list(range(100))


def test_an_error_comes_in_its_place_and_leaving_early_ends_the_thread() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    items = prefetched(failing(), 2, "test")
    assert next(items) == 1
    with pytest.raises(KeyError, match="two"):
        next(items)
    before = threading.active_count()
    endless = prefetched(iter(int, 1), 2, "endless")
    next(endless)
    assert threading.active_count() == before + 1
    endless.close()
    assert threading.active_count() == before


def test_parallel_results_come_in_order_and_few_items_are_taken_ahead() -> None:
    taken: list[int] = []
    for place, (item, result) in enumerate(in_parallel(lambda x: x * x, _counted(60, taken), 2)):
        assert (item, result) == (place, place * place)
        assert len(taken) <= place + 2 + 4 * 2


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Longest possible pauses, in which no time passes but on the clock."""
    waited: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(retry_module.time, "sleep", sleep)
    monkeypatch.setattr(retry_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retry_module.random, "uniform", lambda low, high: high)
    return waited


def test_pauses_double_up_to_a_limit_and_the_last_error_is_raised(pauses) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise ValueError(len(calls))

    with pytest.raises(ValueError, match="6"):
        retry(call, lambda error, attempts: attempts < 6, 1.0, 5.0)
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_only_unreachable_storage_is_waited_for_and_only_so_long(pauses) -> None:
    failures = iter([StoreUnreachable("a", "b"), StoreUnreachable("a", "b")])

    def call() -> str:
        for failure in failures:
            raise failure
        return "done"

    assert retry_while_unreachable(call, 60) == "done"
    assert len(pauses) == 2

    def gone() -> None:
        raise StoreUnreachable("a", "b")

    pauses.clear()
    with pytest.raises(StoreUnreachable):
        retry_while_unreachable(gone, 60)
    assert 60 <= sum(pauses) <= 60 + 15

    # A day: more than 1024 pauses.
    pauses.clear()
    with pytest.raises(StoreUnreachable):
        retry_while_unreachable(gone, 86_400)
    assert 86_400 <= sum(pauses) <= 86_400 + 15

    def wrong() -> None:
        raise TubeletError("no", "never")

    pauses.clear()
    with pytest.raises(TubeletError, match="no"):
        retry_while_unreachable(wrong, 60)
    assert pauses == []


HOLD = """
import sys, time
from pathlib import Path
from tubelet.durable_files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_excludes_other_processes_and_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
        holder.kill()
    with locked(path, wait=False):
        pass


def test_a_lock_whose_file_was_removed_is_taken_on_the_new_file(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []

    def wait() -> None:
        with locked(path):
            order.append("second" if path.exists() else "second, on a file without a name")

    with locked(path):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.1)
        path.unlink()
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    monkeypatch.setattr("tubelet.durable_files.os.replace", _fails)
    with pytest.raises(OSError, match="no"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def _fails(*_: object) -> None:
    raise OSError("no")


def test_devices_that_are_not_here_are_refused_with_a_remedy() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(TubeletError, match=rf"Device '{name}' cannot be used here: .*Use device cpu or auto"):
            choose_device(name)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (float("nan"), "—"),
        (-5e-17, "0"),
        (0.0, "0"),
        (5.0, "5"),
        (123456.0, "123,456"),
        (1234.5, "1,234.5"),
        (12.345, "12.35"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (0.0973, "0.0973"),
        (0.00123456, "0.00123"),
        (2.5e-4, "2.50e\N{MINUS SIGN}04"),
        (1.5e7, "1.50e+07"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_have_about_four_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_sizes_and_durations_have_the_unit_that_keeps_them_short() -> None:
    assert [human_bytes(size) for size in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [human_seconds(seconds) for seconds in (90, 720, 12_240, 483_840)] == ["90 s", "12 min", "3.4 h", "5.6 days"]
