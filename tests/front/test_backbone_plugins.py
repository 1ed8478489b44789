"""Other packages register backbone families under an entry-point group."""

from __future__ import annotations

from importlib.metadata import EntryPoint

from tubelet_pipeline.backbones import registry
from tubelet_pipeline.backbones.video_models import VideoMAE


class Mine(VideoMAE):
    """A family of another package."""

    family = "mine"


def test_a_family_of_another_package_is_found(monkeypatch) -> None:
    entry = EntryPoint("mine", f"{__name__}:Mine", "tubelet.backbones")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "tubelet.backbones" else [])
    found = registry._families()
    assert found["mine"] is Mine
    assert set(found) == {*registry.FAMILIES, "mine"}
