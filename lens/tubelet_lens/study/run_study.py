"""Runs a study: unfinished cells go to Dask workers; each is recorded as soon as it is finished.

    cells ─▶ Dask, one cell per worker ─▶ run/, evaluation/, cell.json ─▶ tables, plots

A cell that fails is listed with its reason, and the others continue. A study that was killed resumes: finished cells
are skipped, training continues from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from distributed import Client, as_completed

from tubelet.config import validate
from tubelet.errors import TubeletError
from tubelet.progress import Progress
from tubelet.tables import Table, Tabular
from tubelet_lens.config import EvaluateConfig
from tubelet_lens.study.cells import Cell, cells
from tubelet_lens.study.config import StudyConfig
from tubelet_lens.study.write_study import write_results
from tubelet_pipeline.cluster import connect
from tubelet_trainer.config import TrainConfig

# A worker may have several threads, but output is redirected for the whole process.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, repr=False)
class StudySummary(Tabular):
    """The result of a study.

    Attributes:
        cells: Cells of the grid.
        done_before: Cells that an earlier run finished.
        failures: Reason by name of the cell.
        page: The page of tables and plots; None if no cell is done.
        tables: By question (`coherence`, `action`, ...): a row per source and variant, statistics over seeds of each
            figure; see `StudyTable.values`.
    """

    cells: int
    done_before: int
    failures: dict[str, str]
    page: Path | None
    tables: Mapping[str, pd.DataFrame]

    def table(self) -> Table:
        """Cells done and failed, and where the page is."""
        rows = [("cells", f"{self.cells - len(self.failures):,} of {self.cells:,} done ({self.done_before:,} before)")]
        rows += [(f"failed: {name}", reason) for name, reason in self.failures.items()]
        rows += [("tables", ", ".join(self.tables))] if self.tables else []
        rows += [("page", str(self.page))] if self.page is not None else []
        return Table.of_rows(("study", "value"), rows)


def study(config: StudyConfig) -> StudySummary:
    """Run the unfinished cells, then write tables and plots of all finished ones.

    Raises:
        TubeletError: a store cannot be opened, the settings are invalid, or a cell's folder has results of others.
    """
    grid = cells(config)
    for cell in grid:
        if cell.stale:
            raise TubeletError(
                f"{cell.folder} has results of other settings or other stores",
                "Use another --out, or delete that folder",
            )
    todo = [cell for cell in grid if not cell.done]
    failures = _run(config, todo) if todo else {}
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "failures.json").write_text(json.dumps(failures, indent=2) + "\n")
    done = [cell for cell in grid if cell.done]
    page, tables = write_results(config, done, failures) if done else (None, {})
    return StudySummary(len(grid), len(grid) - len(todo), failures, page, tables)


def _run(config: StudyConfig, todo: Sequence[Cell]) -> dict[str, str]:
    failures: dict[str, str] = {}
    with (
        connect(config.cluster, tasks_per_worker=1) as client,
        Progress("training and evaluating", len(todo), "cells") as progress,
    ):
        futures = {_submit(client, config, cell): cell for cell in todo}
        for future in as_completed(futures):
            cell = futures[future]
            error = future.exception()
            if error is not None:
                failures[cell.name] = " ".join(str(error).split()) or type(error).__name__
                progress.note(f"{cell.name} failed: {failures[cell.name]}")
            progress.advance()
            future.release()
    return failures


def _submit(client: Client, config: StudyConfig, cell: Cell) -> Any:
    return client.submit(
        run_cell,
        cell.train.model_dump(mode="json"),
        cell.evaluate.model_dump(mode="json"),
        str(cell.folder),
        cell.digest,
        config.cluster.threads,
        key=f"cell-{cell.digest[:24]}",
        retries=config.retries,
        resources=config.cluster.resources or None,
        pure=False,
    )


def run_cell(train_tree: dict[str, Any], evaluate_tree: dict[str, Any], folder: str, digest: str, threads: int) -> str:
    """Train and evaluate one cell, on a worker; output goes to `cell.log`."""
    import torch

    from tubelet_lens.evaluate import evaluate
    from tubelet_trainer.run.loop import train

    torch.set_num_threads(threads)
    cell = Path(folder)
    cell.mkdir(parents=True, exist_ok=True)
    (cell / "begun.json").write_text(json.dumps({"digest": digest}) + "\n")
    evaluate_config = validate(EvaluateConfig, evaluate_tree, "the study")
    with (
        _ONE_AT_A_TIME,
        (cell / "cell.log").open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        train(validate(TrainConfig, train_tree, "the study"))
        assert evaluate_config.out is not None
        evaluate(evaluate_config).write(evaluate_config.out)
    mark = cell / "cell.json.part"
    mark.write_text(json.dumps({"digest": digest, "train": train_tree, "evaluate": evaluate_tree}, indent=2) + "\n")
    mark.replace(cell / "cell.json")
    # Only the SAE is needed from here on; checkpoints are for resuming.
    shutil.rmtree(cell / "run" / "checkpoints", ignore_errors=True)
    return folder
