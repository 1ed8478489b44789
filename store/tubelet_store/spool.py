"""Finished shards on the local disk that wait until the object storage is reachable again.

    finished shard ─▶ keep (storage unreachable) ─▶ <directory>/<store>/<shard>/ ─▶ drain (reachable) ─▶ removed

An entry appears whole or not at all and is removed after its commit record is in the store, so a kill at any time loses
nothing; the next run on this machine with the same plan uploads what it finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from pathlib import Path

from pydantic import Field

from tubelet.config import Config
from tubelet.durable_files import locked, synchronize
from tubelet.errors import StoreUnreachable
from tubelet.paths import cache_folder
from tubelet_store.commit import Commit
from tubelet_store.finished_shard import FinishedShard, publish
from tubelet_store.plan import Plan
from tubelet_store.storage.object_root import ObjectRoot

_COMMIT, _MOMENTS = "commit.json", "moments"


class UploadConfig(Config):
    """What happens while object storage is unreachable."""

    spool_dir: Path | None = None
    """Folder for finished shards that wait for upload; none: `spool` in $TUBELET_CACHE, else in ~/.cache/tubelet."""
    spool_mb: int = Field(default=20_480, ge=0)
    """Maximum size of that folder on each machine, in MiB, over all stores and workers."""
    patience_s: float = Field(default=900, ge=0)
    """Seconds to wait for the storage when the folder is full, or at the end of the job, before the job fails."""


class Spool:
    """Waiting shards of one store on this machine.

    Args:
        config: Where and how much.
        url: The store.
        plan: Its plan; shards of another plan are not seen.
    """

    def __init__(self, config: UploadConfig, url: str, plan: Plan) -> None:
        self.directory = config.spool_dir or cache_folder("spool")
        self.limit_bytes = config.spool_mb << 20
        self.patience_s = config.patience_s
        self._plan = plan
        self._folder = self.directory / hashlib.sha256(f"{url} {plan.digest}".encode()).hexdigest()[:24]

    def shards(self) -> list[int]:
        """Shards that wait, ascending."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(int(name) for name in os.listdir(self._folder) if name.isdecimal())
        return []

    def keep(self, finished: FinishedShard) -> bool:
        """Move the files of `finished` here; False where there is no room."""
        shard = finished.commit.shard
        self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory / "room.lock"):
            if (self._folder / str(shard)).exists():
                return True
            used = sum(f.stat().st_size for f in self.directory.rglob("*") if f.is_file())
            if used + finished.size_bytes > self.limit_bytes:
                return False
            partial = self._folder / f"partial-{uuid.uuid4().hex}"
            partial.mkdir(parents=True)
            for number, stored in enumerate(finished.commit.objects):
                shutil.move(finished.files[stored.key], partial / str(number))
            (partial / _MOMENTS).write_bytes(finished.moments)
            (partial / _COMMIT).write_text(finished.commit.model_dump_json())
            for path in [*partial.iterdir(), partial]:
                synchronize(path)
            partial.rename(self._folder / str(shard))
        return True

    def drain(self, root: ObjectRoot) -> list[int]:
        """Upload waiting shards until the storage fails; shards that another process is uploading are skipped.

        Returns:
            Shards that are committed now.
        """
        done = []
        for shard in self.shards():
            entry = self._folder / str(shard)
            with contextlib.ExitStack() as lock:
                try:
                    lock.enter_context(locked(self._folder / f"{shard}.lock", wait=False))
                except BlockingIOError:
                    continue
                if not entry.exists():
                    continue
                try:
                    publish(root, self._plan, self._read(entry))
                except StoreUnreachable:
                    break
                # Renamed first: a partly removed entry must not look complete.
                removed = self._folder / f"partial-{uuid.uuid4().hex}"
                entry.rename(removed)
                # `discard_partial` of another process may be at it too.
                shutil.rmtree(removed, ignore_errors=True)
                (self._folder / f"{shard}.lock").unlink()
            done.append(shard)
        return done

    def discard_partial(self) -> None:
        """Remove entries of processes that were killed while they moved a shard here."""
        if self._folder.exists():
            with locked(self.directory / "room.lock"):
                for partial in self._folder.glob("partial-*"):
                    shutil.rmtree(partial, ignore_errors=True)

    def _read(self, entry: Path) -> FinishedShard:
        commit = Commit.model_validate_json((entry / _COMMIT).read_text())
        files = {stored.key: entry / str(number) for number, stored in enumerate(commit.objects)}
        return FinishedShard(commit, (entry / _MOMENTS).read_bytes(), files)
