"""From decoded frames to the pixels a backbone was trained on, in plain torch.

    uint8 [T, H, W, 3] ──resize──▶ uint8 ──center crop──▶ uint8 ──(x / scale - mean) / std──▶ float32 [T, 3, h, w]

The numbers come from the checkpoint's processor file, never from the defaults of a class: the VideoMAE class has mean
0.5, its published checkpoints have ImageNet's. The arithmetic equals that of transformers' tensor backend (antialiased
resizing in uint8, sizes and offsets truncated by `int()`, rescaling folded into mean and deviation), without
torchvision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError, model_validator

from tubelet.config import Config
from tubelet.errors import TubeletError

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")

# Codes of PIL.Image.Resampling, as in processor files.
INTERPOLATIONS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}


class CropBox(NamedTuple):
    """The part of a frame that the backbone sees, in pixels of the source frame (fractions, because it was resized)."""

    top: float
    left: float
    height: float
    width: float


class Place(NamedTuple):
    """Position of a crop in the resized frame; by default its center."""

    along: float | None = None
    """Position along the longer side: 0 (start), 1/2 or 1 (end). None: centered."""
    room: tuple[int, int] = (0, 0)
    """Pixels (down, right) by which the frame is resized larger, to make space for shifted crops."""
    offset: tuple[int, int] = (0, 0)
    """Pixels (down, right) by which this crop is shifted, up to `room`."""


CENTER = Place()


class Preprocessing(Config):
    """Resize, center crop and normalize: `(pixel * rescale - offset - mean) / std`."""

    shortest_edge: int | None = Field(default=None, gt=0)
    """Resize so that the shorter side has this many pixels, keeping the aspect ratio."""
    resize_to: tuple[int, int] | None = None
    """Resize to exactly (height, width), whatever the aspect ratio."""
    crop: tuple[int, int] | None = None
    """Center crop (height, width) after resizing."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resizing filter; always antialiased."""
    rescale: float = Field(default=1 / 255, gt=0)
    """Factor on the uint8 value."""
    offset: float = 0.0
    """Subtracted after rescaling (ViViT: 1, so that pixels lie in -1..1)."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Mean per color, red first, after rescaling."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Standard deviation per color, red first, after rescaling."""

    @model_validator(mode="after")
    def _check_output_size(self) -> Preprocessing:
        if self.shortest_edge is not None and self.resize_to is not None:
            raise ValueError("shortest_edge and resize_to exclude each other")
        if self.crop is None and self.resize_to is None:
            raise ValueError("frames would differ in size from video to video; set crop or resize_to")
        resized = self.resize_to or (self.shortest_edge, self.shortest_edge)
        for side, cropped in zip(resized, self.crop or (), strict=False):
            if side is not None and cropped > side:
                raise ValueError(f"a crop of {cropped} pixels does not fit into a side of {side}")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the output."""
        size = self.crop or self.resize_to
        if size is None:
            raise ValueError("unreachable: validation requires crop or resize_to")
        return size

    def resized(self, height: int, width: int, room: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Height and width of a frame after resizing; truncated, not rounded, as the published processors do.

        Args:
            height: Of the frame.
            width: Of the frame.
            room: Additional pixels around a crop: the frame is resized larger by the factor (crop + room) / crop.
        """
        (crop_height, more_height), (crop_width, more_width) = zip(self.size, room, strict=True)
        if self.resize_to is not None:
            down, across = self.resize_to
            return (
                down * (crop_height + more_height) // crop_height,
                across * (crop_width + more_width) // crop_width,
            )
        short = self.shortest_edge
        if short is None:
            return height, width
        short = max(
            short * (crop_height + more_height) // crop_height,
            short * (crop_width + more_width) // crop_width,
        )
        if height <= width:
            return short, int(short * width / height)
        return int(short * height / width), short

    def __call__(self, frames_u8: np.ndarray, place: Place = CENTER) -> tuple[torch.Tensor, CropBox]:
        """Pixels of one clip.

        Args:
            frames_u8: uint8 [T, H, W, 3], red first.
            place: Position of the crop.

        Returns:
            float32 [T, 3, h, w] on the CPU with (h, w) = `size`, and the box of the source frame that they show.

        Raises:
            TubeletError: without resizing, the frame is smaller than the crop.
            ValueError: `frames_u8` has another dtype or shape.
        """
        if frames_u8.dtype != np.uint8 or frames_u8.ndim != 4 or frames_u8.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], not {frames_u8.dtype} {list(frames_u8.shape)}")
        # torch has no read-only tensors and warns about a read-only buffer.
        frames = torch.from_numpy(frames_u8 if frames_u8.flags.writeable else frames_u8.copy()).permute(0, 3, 1, 2)
        height, width = frames_u8.shape[1:3]
        resized = self.resized(height, width, place.room)
        if resized != (height, width):
            frames = F.interpolate(
                frames, size=resized, mode=self.interpolation, antialias=True, align_corners=False
            )  # stays uint8
        crop_height, crop_width = self.size
        over = (resized[0] - crop_height - place.room[0], resized[1] - crop_width - place.room[1])
        if min(over) < 0:
            raise TubeletError(
                f"A frame of {width}x{height} pixels is smaller than the crop of {crop_width + place.room[1]}x"
                f"{crop_height + place.room[0]}",
                "Set backbone.preprocessing.shortest_edge, so that frames are resized first",
            )
        top, left = (pixels // 2 + shift for pixels, shift in zip(over, place.offset, strict=True))
        if place.along is not None:
            top, left = (int(place.along * over[0]), left) if height > width else (top, int(place.along * over[1]))
        pixels = frames[..., top : top + crop_height, left : left + crop_width].to(torch.float32)
        scale = 1.0 / self.rescale
        mean = (torch.tensor(self.mean) + self.offset) * scale
        std = torch.tensor(self.std) * scale
        pixels = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        per_row, per_column = height / resized[0], width / resized[1]
        box = CropBox(top * per_row, left * per_column, crop_height * per_row, crop_width * per_column)
        return pixels.contiguous(), box


def read_preprocessing(folder: Path, origin: str, *, square: bool = False) -> Preprocessing:
    """Preprocessing of the checkpoint in `folder`, from its processor file.

    Args:
        folder: Local folder of the checkpoint.
        origin: Name of the checkpoint, for error messages.
        square: What a bare `"size": 224` means for this family: 224x224 (True) or shortest edge 224 (False).

    Raises:
        TubeletError: there is no processor file, or it requires an unsupported operation.
    """
    for name in PROCESSOR_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TubeletError(f"{name} of {origin} is not JSON: {error}", "Fetch the file again") from error
        if isinstance(fields, dict):
            fields = fields.get("video_processor") or fields.get("image_processor") or fields
        if not isinstance(fields, dict):
            raise TubeletError(f"{name} of {origin} holds no mapping", "Fetch the file again")
        return parse_processor(fields, f"{name} of {origin}", square=square)
    raise TubeletError(
        f"{origin} has no {PROCESSOR_FILES[0]}, so its preprocessing is unknown",
        "Copy that file from the model's page into the folder, or set backbone.preprocessing yourself",
    )


def parse_processor(fields: dict[str, Any], origin: str, *, square: bool = False) -> Preprocessing:
    """Preprocessing that a processor file's `fields` state; see `read_preprocessing`."""
    remedy = "Set backbone.preprocessing yourself"

    def need(name: str) -> Any:
        if fields.get(name) is None:
            raise TubeletError(f"{origin} does not say '{name}'", remedy)
        return fields[name]

    if fields.get("do_pad"):
        raise TubeletError(f"{origin} requires padding (do_pad), which would make tokens without content", remedy)
    parsed: dict[str, Any] = {}
    if fields.get("do_resize", True):
        size = need("size")
        if isinstance(size, int):
            size = {"height": size, "width": size} if square else {"shortest_edge": size}
        if set(size) == {"shortest_edge"}:
            parsed["shortest_edge"] = size["shortest_edge"]
        elif set(size) == {"height", "width"}:
            parsed["resize_to"] = (size["height"], size["width"])
        else:
            raise TubeletError(f"{origin} has a size of {sorted(size)}, which is not supported", remedy)
        code = need("resample")
        if code not in INTERPOLATIONS:
            raise TubeletError(f"{origin} has resample {code}; known are 2 (bilinear) and 3 (bicubic)", remedy)
        parsed["interpolation"] = INTERPOLATIONS[code]
    if fields.get("do_center_crop", fields.get("crop_size") is not None):
        crop = need("crop_size")
        parsed["crop"] = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
    if not fields.get("do_rescale", True):
        parsed["rescale"] = 1.0
    elif fields.get("rescale_factor") is not None:
        parsed["rescale"] = fields["rescale_factor"]
    if fields.get("offset"):
        parsed["offset"] = 1.0
    if fields.get("do_normalize", True):
        parsed["mean"], parsed["std"] = tuple(need("image_mean")), tuple(need("image_std"))
    try:
        return Preprocessing(**parsed)
    except ValidationError as error:
        raise TubeletError(f"{origin} does not fit: {error.errors()[0]['msg']}", remedy) from error
