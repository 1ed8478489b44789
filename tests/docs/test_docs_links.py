"""A link inside the repository leads to a file, and its anchor to a heading there."""

from __future__ import annotations

import re

import pages
import pytest

_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower())) for heading in headings}


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.relative_to(pages.ROOT).as_posix())
def test_links_resolve(page):
    for link in _LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in _anchors(target.read_text()), link


def test_folders_that_the_readme_maps_exist():
    readme = (pages.ROOT / "README.md").read_text()
    folders = re.findall(r"`([a-z]+)/`", readme)
    assert {"store", "pipeline", "trainer", "lens"} <= set(folders)
    assert [folder for folder in folders if not (pages.ROOT / folder).is_dir()] == []
