"""Extraction as a job of a cluster: what travels, what is logged, what deadly shards and lost networks do to it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from distributed import Client
from test_extract import PATIENT_S, commits, content, wait_for_commits

from faulty_proxy import FaultyProxy, faulty_proxy
from object_server import create_bucket, lead_to, s3_environment, s3_server
from processes import run_tubelet, start_tubelet
from tubelet.errors import TubeletError
from tubelet_pipeline.driver import extract
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.shard_task import ShardReport, run_shard
from tubelet_store.reader import open_store
from tubelet_store.storage import open_root

SECRET = s3_environment("")["AWS_SECRET_ACCESS_KEY"]
DEADLY = 4

# Workers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before an S3 server; the environment leads to it."""
    with s3_server() as server, faulty_proxy(server) as (proxy, endpoint):
        create_bucket(server, "bucket")
        lead_to(endpoint, monkeypatch)
        yield proxy


def settings(job_settings: dict[str, Any], store: str, tmp_path: Path, **fields: Any) -> ExtractConfig:
    upload = {"spool_dir": str(tmp_path / "spool"), "patience_s": PATIENT_S}
    log = str(tmp_path / "run.jsonl")
    return ExtractConfig.model_validate({**job_settings, "store": store, "upload": upload, "log": log, **fields})


def events(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]


def spooled(tmp_path: Path) -> list[int]:
    return [event["shard"] for event in events(tmp_path) if event["event"] == "spooled"]


def deadly(job_json: str, shard: int) -> ShardReport:
    if shard == DEADLY:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_shard(job_json, shard)


def test_no_secret_and_no_array_travels_or_stays(
    proxy: FaultyProxy,
    job_settings: dict[str, Any],
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sent: list[bytes] = []
    send = Client._send_to_scheduler

    def listen(self: Client, message: dict[str, Any]) -> None:
        if message.get("op") == "update-graph":
            sent.append(pickle.dumps(message))
        send(self, message)

    monkeypatch.setattr(Client, "_send_to_scheduler", listen)
    url = f"s3://bucket/{uuid.uuid4().hex}.zarr"
    summary = extract(settings(job_settings, url, tmp_path))
    assert summary.identity == open_store(str(undisturbed)).identity

    tasks = [message for message in sent if b"shard-" in message]
    assert len(tasks) == 9
    assert max(map(len, tasks)) < 6000
    shown = capfd.readouterr()
    stored = [open_root(url).read(key) for key in open_root(url).list_keys()]
    everything = [*sent, *stored, (tmp_path / "run.jsonl").read_bytes(), shown.out.encode(), shown.err.encode()]
    for place in everything:
        assert SECRET.encode() not in place
        assert b"AKIAEXAMPLE" not in place
        assert str(proxy.upstream).encode() not in place or place in (shown.out.encode(), shown.err.encode())

    log = events(tmp_path)
    assert [event["event"] for event in log] == ["start", *["shard"] * 9, "end"]
    assert sum(sum(event["clips"].values()) for event in log if event["event"] == "shard") == 26
    assert log[-1]["identity"] == summary.identity
    assert {"decode", "forward", "total", "publish"} <= set(log[1]["seconds"])


def test_a_shard_that_kills_its_workers_is_named_and_the_others_complete(
    job_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(job_settings, str(tmp_path / "s.zarr"), tmp_path)
    with monkeypatch.context() as patched:
        patched.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "1")
        import dask

        with dask.config.set({"distributed.scheduler.allowed-failures": 1}), pytest.raises(TubeletError) as caught:
            extract(config, task=deadly)
    message = str(caught.value)
    assert f"1 of 9 shards could not be extracted: shard {DEADLY} (" in message
    assert message.count(".webm") == 3
    assert "its worker ended repeatedly" in message
    assert commits(tmp_path / "s.zarr") == 8
    assert [event["shard"] for event in events(tmp_path) if event["event"] == "failed"] == [DEADLY]
    assert extract(config).shards_this_run == 1


def test_ctrl_c_and_preemption_are_one_line_and_a_rerun_completes(job: Path, undisturbed: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # inherited from a shell's background job
        process = start_tubelet("extract", str(job))
        wait_for_commits(store, 1, process)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=PATIENT_S)
        assert process.returncode == 128 + signal.SIGINT
        assert "interrupted" in err
        assert "Traceback" not in err
        assert "distributed" not in err

    process = start_tubelet("extract", str(job))
    wait_for_commits(store, commits(store) + 1, process)
    process.terminate()
    _, err = process.communicate(timeout=PATIENT_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; run the same command again" in err
    assert "Traceback" not in err
    status, _, err = run_tubelet("extract", str(job))
    assert status == 0, err
    assert content(store) == content(undisturbed)


def test_a_network_that_is_away_for_a_while_costs_nothing(
    proxy: FaultyProxy, job_settings: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    def come_back() -> None:
        deadline = time.monotonic() + PATIENT_S
        while not spooled(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.2)
        proxy.refuse = False

    def away(summary: Any) -> None:
        if summary.shards_this_run == 1:
            proxy.refuse = True
            threading.Thread(target=come_back).start()

    url = f"s3://bucket/{uuid.uuid4().hex}.zarr"
    summary = extract(settings(job_settings, url, tmp_path), away)
    assert summary.identity == open_store(str(undisturbed)).identity
    assert summary.shards_done == 9
    assert spooled(tmp_path)
    assert not list((tmp_path / "spool").rglob("commit.json"))
