"""`tubelet gallery`: writes a static site from a run, a store and its videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from tubelet.device import choose_device
from tubelet.errors import TubeletError
from tubelet.formats import human_bytes
from tubelet.progress import Progress
from tubelet.tables import Table, Tabular
from tubelet_lens.codes.dictionary import Nearest, directions, nearest_latents
from tubelet_lens.gallery.config import GalleryConfig, LatentList, TopLatents
from tubelet_lens.gallery.effects import Effects, MeanCodes, probe_effects, read_effects
from tubelet_lens.gallery.heat_maps import HeatMaps
from tubelet_lens.gallery.latent_statistics import Statistic, pick, statistics
from tubelet_lens.gallery.pages import DATA, About, ExemplarClip, Latent, Pages, peak_frame, static_files
from tubelet_lens.gallery.sheets import ClipFrames, SheetConfig
from tubelet_lens.gallery.site import INDEX, Site, page_key, sheet_key
from tubelet_lens.gallery.survey import Exemplar, Survey, SurveyResult, exemplars
from tubelet_lens.inputs.clip_selection import choose_clips, some_of
from tubelet_lens.inputs.clip_stream import Window, clip_bytes, windows
from tubelet_lens.inputs.latent_time import latent_time
from tubelet_lens.inputs.trained_sae import TrainedSae, check_store, load_trained
from tubelet_lens.results.evaluation import read_evaluation
from tubelet_lens.results.latent_table import FILE, read_latents
from tubelet_store.reader import Store, open_store
from tubelet_trainer.data.holdout import held_out

_NEAREST = 6
_PROBE_CLIPS = 4000


@dataclass(frozen=True, repr=False)
class GallerySummary(Tabular):
    """What was written.

    Attributes:
        address: Of the first page.
        pages: Latents with a page.
        silent: Selected latents that fire on none of the clips.
        clips: Clips on pages.
        no_picture: Clips of those without pictures.
        reason: Why the first of those has none.
        no_evaluation: Whether the latents' figures of an evaluation are missing, because none was found.
        size_bytes: Bytes written.
    """

    address: str
    pages: int
    silent: int
    clips: int
    no_picture: int
    reason: str | None
    no_evaluation: bool
    size_bytes: int

    def table(self) -> Table:
        """What was written."""
        rows = [
            ("address", self.address),
            ("latents", f"{self.pages:,} with a page, {self.silent:,} fire on none of the clips"),
            ("clips", f"{self.clips:,}"),
            ("without pictures", f"{self.no_picture:,}{f' ({self.reason})' if self.reason else ''}"),
            ("written", human_bytes(self.size_bytes)),
        ]
        return Table.of_rows(("gallery", "value"), rows)


class _Collector(Protocol):
    def add(self, window: Window) -> None: ...


def make_gallery(config: GalleryConfig) -> GallerySummary:
    """Write the site that `config` describes.

    Raises:
        TubeletError: run, store, evaluation or effects cannot be read or do not belong together; no latent is left to
            show; or `config.out` holds something else.
    """
    device = choose_device(config.device)
    trained = load_trained(config.run, str(device))
    store = open_store(config.store)
    check_store(trained, store, config.other_store)
    folder = _evaluation_folder(config)
    effects_path = config.effects or _if_there(folder, FILE)
    edits = read_effects(effects_path) if effects_path is not None else {}
    evaluated = read_latents(folder) if folder is not None else None
    passes = _StorePasses(config, trained, store, device)
    labels = _Labels(store)
    survey, probe = passes.survey(labels)
    figures = statistics(survey, evaluated, str(folder))
    shown, silent = _chosen(config, survey, figures)
    by_latent = {latent: exemplars(survey, latent, config.lower_clips) for latent in shown}
    needed = sorted({each.clip for several in by_latent.values() for each in several})
    sheet = SheetConfig(config.frame_px, config.picture_quality, _aspect(store))
    out = config.out if config.out is not None else str(config.run / "gallery")
    drawn_from = {"store": store.identity, "videos": config.videos, **vars(sheet)}
    with Site(out, drawn_from) as site:
        missing = _write_sheets(site, store, needed, config, sheet)
        clips = _described(store, needed, missing)
        about = _about(trained, store, survey, sheet.aspect, folder, missing, len(needed))
        pages = Pages(about, figures, survey, labels.names, shown, clips)
        near = nearest_latents(directions(trained.coder), _NEAREST, survey.tokens_F > 0)
        peaks: dict[int, int] = {}

        def written() -> Iterator[tuple[str, bytes]]:
            for latent in passes.latents(by_latent, near, _joined(probe, edits)):
                clip = latent.exemplars[0].clip
                peaks[latent.number] = peak_frame(latent.maps[clip], clips[clip].frames)
                yield page_key(latent.number), pages.latent(latent)

        site.write(static_files())
        site.write(written())
        site.write([(DATA, pages.data(by_latent, peaks))])
        site.write([(INDEX, pages.overview())])
        site.finish(shown, {"config": _published(config), "store": store.identity, "latents": len(shown)})
        return GallerySummary(
            address=f"{site.root.url}/{INDEX}",
            pages=len(shown),
            silent=silent,
            clips=len(needed),
            no_picture=len(missing),
            reason=next(iter(missing.values()), None),
            no_evaluation=folder is None,
            size_bytes=site.size_bytes,
        )


def _published(config: GalleryConfig) -> dict[str, JsonValue]:
    """The settings for publication: of paths only the last part, and without the site's location."""
    published: dict[str, JsonValue] = config.model_dump(mode="json", exclude={"out"})
    places: dict[str, Path | str | None] = {"run": config.run, "store": config.store, "videos": config.videos}
    places |= {"evaluation": config.evaluation, "effects": config.effects}
    for field, place in places.items():
        # A folder may be given as `.`.
        published[field] = None if place is None else Path(place).name or Path(place).resolve().name
    return published


class _Labels:
    """Labels of a store's clips, numbered 0 ... L - 1 in the order of the store's own numbers."""

    def __init__(self, store: Store) -> None:
        table = store.clips()
        clip = table["clip"].to_numpy()
        names = {
            label: name if name is not None else f"label {label}"
            for label, name in zip(table["label"].to_pylist(), table["label_name"].to_pylist(), strict=True)
            if label is not None
        }
        order = sorted(names)
        place = {label: at for at, label in enumerate(order)}
        self.names = [names[label] for label in order]
        self.of_clip = np.full(store.plan.clips, -1, dtype=np.int64)
        self.of_clip[clip] = [-1 if label is None else place[label] for label in table["label"].to_pylist()]


class _StorePasses:
    """Passes over the store: the survey, then the heat-maps."""

    def __init__(self, config: GalleryConfig, trained: TrainedSae, store: Store, device: torch.device) -> None:
        self._config, self._trained, self._store, self._device = config, trained, store, device
        self._clips = choose_clips(store, config.split, trained.holdout, config.limit_clips)
        self._valid = latent_time(store, self._clips).valid_CT
        table = store.clips()
        videos = np.asarray(table["video_id"].to_pylist(), dtype=object)
        _, first, number = np.unique(videos, return_index=True, return_inverse=True)
        self._video_of_clip = np.zeros(store.plan.clips, dtype=np.int64)
        # Numbered by first appearance, to keep the order of the store.
        self._video_of_clip[table["clip"].to_numpy()] = np.argsort(np.argsort(first))[number]
        self._clips = self._clips[np.argsort(self._video_of_clip[self._clips], kind="stable")]
        out = np.zeros(store.plan.clips, dtype=bool)
        out[table["clip"].to_numpy()] = held_out(table["video_id"].to_pylist(), trained.holdout)
        self._held_out = out

    def survey(self, labels: _Labels) -> tuple[SurveyResult, dict[int, tuple[Effects, ...]]]:
        """The survey, in one pass, and effects on a probe."""
        coder = self._trained.coder
        survey = Survey(
            coder.latents,
            self._video_of_clip,
            labels.of_clip,
            len(labels.names),
            top_clips=self._config.top_clips,
            seed=self._config.seed,
            device=self._device,
        )
        most = max(1, min(_PROBE_CLIPS, self._config.window_mib * 2**20 // (8 * coder.latents)))
        labeled_clips = self._clips[labels.of_clip[self._clips] >= 0]
        probed = some_of(labeled_clips, most)
        codes = MeanCodes(probed)
        self._stream("finding the strongest clips", self._clips, [survey, codes])
        probe: dict[int, tuple[Effects, ...]] = {}
        if len(probed):
            clips, rows = codes.result()
            test = self._held_out[clips]
            probe = probe_effects(
                rows,
                labels.of_clip[clips],
                [str(self._video_of_clip[clip]) for clip in clips],
                test & ~test.all(),
                labels.names,
                self._config.seed,
            )
        return survey.result(), probe

    def latents(
        self,
        by_latent: Mapping[int, tuple[Exemplar, ...]],
        near: Nearest,
        effects: Mapping[int, tuple[Effects, ...]],
    ) -> Iterator[Latent]:
        """Every latent with its heat-maps, as many at a time as fit into memory."""
        grid = self._store.plan.grid
        each = (self._config.top_clips + self._config.lower_clips) * grid.tokens
        at_once = max(1, self._config.window_mib * 2**20 // each)
        numbers = list(by_latent)
        for start in range(0, len(numbers), at_once):
            several = numbers[start : start + at_once]
            maps = HeatMaps(
                {latent: [each.clip for each in by_latent[latent]] for latent in several},
                {latent: abs(by_latent[latent][0].peak) for latent in several},
            )
            self._stream("drawing heat-maps", maps.clips, [maps])
            for latent in several:
                yield Latent(
                    number=latent,
                    exemplars=by_latent[latent],
                    maps={each.clip: maps.maps[latent, each.clip] for each in by_latent[latent]},
                    nearest=tuple(
                        (other, cosine)
                        for other, cosine in zip(
                            near.latents_Fk[latent].tolist(), near.cosines_Fk[latent].tolist(), strict=True
                        )
                        if other >= 0
                    ),
                    effects=effects.get(latent, ()),
                )

    def _stream(self, label: str, clips: NDArray[np.int64], collectors: Sequence[_Collector]) -> None:
        coder, hook, store = self._trained.coder, self._trained.hook, self._store
        held = max(1, self._config.window_mib * 2**20 // clip_bytes(store, hook, coder.latents))
        passing = windows(store, hook, coder, clips, self._valid, clips_per_window=held, device=self._device)
        with Progress(label, len(clips), "clips") as progress:
            for window in passing:
                for collector in collectors:
                    collector.add(window)
                progress.advance(len(window.clips))


def _evaluation_folder(config: GalleryConfig) -> Path | None:
    if config.evaluation is not None:
        return config.evaluation
    folder = config.run / "evaluation"
    return folder if (folder / "latents.parquet").is_file() else None


def _if_there(folder: Path | None, name: str) -> Path | None:
    return folder / name if folder is not None and (folder / name).is_file() else None


def _chosen(config: GalleryConfig, survey: SurveyResult, figures: Sequence[Statistic]) -> tuple[list[int], int]:
    """Latents with a page, ascending, and the number of selected ones that fire on no clip."""
    fires = survey.tokens_F > 0
    wanted = np.arange(len(fires))
    if isinstance(config.latents, LatentList):
        wanted = np.unique(config.latents.numbers)
        if wanted[-1] >= len(fires):
            raise TubeletError(f"There is no latent {wanted[-1]}", f"The SAE has {len(fires)}: 0 to {len(fires) - 1}")
    elif isinstance(config.latents, TopLatents):
        values = pick(figures, config.latents.by).values_F
        wanted = np.flatnonzero(fires & ~np.isnan(values))
        order = np.argsort(values[wanted] if config.latents.lowest else -values[wanted], kind="stable")
        wanted = wanted[np.sort(order[: config.latents.n])]
    shown = wanted[fires[wanted]]
    if not len(shown):
        raise TubeletError(
            f"None of the {len(wanted)} given latents fires on any of the {survey.clips} clips",
            "Look at more clips, or choose other latents",
        )
    return shown.tolist(), len(wanted) - len(shown)


def _aspect(store: Store) -> float:
    # Patches are square; a pooled grid's boxes need not be.
    grid = store.plan.tokens.grid if store.plan.tokens is not None else store.plan.grid
    return grid.width / grid.height


def _write_sheets(
    site: Site, store: Store, clips: Sequence[int], config: GalleryConfig, sheet: SheetConfig
) -> dict[int, str]:
    """Write the missing sheets; returns the reason for each clip without one."""
    missing: dict[int, str] = {}
    todo = [clip for clip in clips if clip not in site.sheets]
    if not todo:
        return missing
    root = config.videos if config.videos is not None else store.state.provenance.get("dataset_root")
    if not isinstance(root, str):
        return dict.fromkeys(todo, "the store does not record where its videos are")
    try:
        sheets = ClipFrames(store, root).sheets(todo, config.decode, sheet)
        with Progress("reading frames", len(todo), "clips") as progress:

            def drawn() -> Iterator[tuple[str, bytes]]:
                for clip, data in sheets:
                    progress.advance()
                    if isinstance(data, str):
                        missing[clip] = data
                    else:
                        yield sheet_key(clip), data

            site.write(drawn())
    except ImportError as error:
        # The full message may contain paths of this machine.
        return dict.fromkeys(todo, f"videos cannot be read here: {error.name or 'a package'} cannot be imported")
    return missing


def _described(store: Store, numbers: Sequence[int], missing: Mapping[int, str]) -> dict[int, ExemplarClip]:
    at = {clip: row for row, clip in enumerate(store.clips()["clip"].to_pylist())}
    rows = store.clips().take([at[clip] for clip in numbers]).to_pylist()
    return {
        row["clip"]: ExemplarClip(
            number=row["clip"],
            video=row["video_id"],
            label=_label(row),
            caption=row["caption"],
            frames=len(row["frame_indices"]) if row["frame_indices"] else store.plan.grid.time,
            frame_s=_frame_seconds(row),
            patches=tuple(row["patches"]) if row["patches"] is not None else None,
            no_picture=missing.get(row["clip"]),
        )
        for row in rows
    }


def _label(row: Mapping[str, object]) -> str | None:
    if row["label"] is None:
        return None
    return str(row["label_name"]) if row["label_name"] is not None else f"label {row['label']}"


def _frame_seconds(row: Mapping[str, object]) -> float | None:
    times = row["timestamps_s"]
    if not isinstance(times, list) or len(times) < 2:
        return None
    step = float(np.median(np.diff(times)))
    return step if step > 0 else None


def _about(
    trained: TrainedSae,
    store: Store,
    survey: SurveyResult,
    aspect: float,
    folder: Path | None,
    missing: Mapping[int, str],
    clips: int,
) -> About:
    notes = []
    provenance = {
        "SAE": f"{trained.folder.resolve().name}: {trained.recipe['kind']}, {trained.coder.latents:,} latents",
        "Hook": trained.hook,
        "Store": f"{Path(store.url).name} ({store.identity})",
        "Backbone": str(store.plan.backbone.get("id", "unknown")),
        "Clips": f"{survey.clips:,} clips of {survey.videos:,} videos, {survey.tokens:,} tokens",
    }
    if folder is None:
        notes.append(
            "There was no evaluation of this SAE, so its figures (coherence, monosemanticity, ...) are missing. Run "
            "tubelet evaluate first to include them."
        )
    elif (folder / "evaluation.json").is_file():
        evaluation = read_evaluation(folder / "evaluation.json")
        where = f"{evaluation.coverage.clips:,} clips of {evaluation.store.get('name')}"
        provenance["Figures from"] = f"the evaluation of {evaluation.sae.get('run')} on {where}"
    if missing:
        reason = next(iter(missing.values()))
        notes.append(f"{len(missing):,} of {clips:,} clips have no frames and are shown as heat-maps only ({reason}).")
    if store.kept_patches is not None:
        notes.append("The store has only some patches of each clip; veiled patches are not stored.")
    return About(
        run=trained.folder.resolve().name,
        store=Path(store.url).name,
        hook=trained.hook,
        places=store.plan.position_grid,
        aspect=aspect,
        clips=survey.clips,
        videos=survey.videos,
        latents=trained.coder.latents,
        notes=tuple(notes),
        provenance=tuple(provenance.items()),
    )


def _joined(
    first: Mapping[int, tuple[Effects, ...]], second: Mapping[int, tuple[Effects, ...]]
) -> dict[int, tuple[Effects, ...]]:
    return {latent: first.get(latent, ()) + second.get(latent, ()) for latent in {*first, *second}}
