"""Which module imports which: no circle, whatever the order in which modules are first imported."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

PACKAGES = ("tubelet", "tubelet_store", "tubelet_pipeline", "tubelet_trainer", "tubelet_lens")


def test_no_import_circle():
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert any(imported.values())
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        # What is imported comes first.
        pytest.fail("import circle: " + " <- ".join(error.args[1]))
