"""A frozen backbone: clips in, token activations at named hooks out, always as [clip, time, space, channel].

A family (`video_models`, `image_models`) states only its architecture: where the blocks are, which tokens come first
and in which order. A `VideoBackbone` runs on the whole clip at once, an `ImageBackbone` frame by frame.

Hook names:
    blocks.I        residual stream after block I (0-based; `blocks.-1` is the last)
    blocks.I.attn   what attention adds to the residual stream in block I
    blocks.I.mlp    what the MLP adds to it; blocks.I = blocks.I-1 + blocks.I.attn + blocks.I.mlp
    final_norm      the last block's output after the model's final norm, where it has one
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from tubelet.device import choose_device
from tubelet.errors import TubeletError, nearest
from tubelet_pipeline.backbones.hooks import CompiledCapture, capture, find_blocks
from tubelet_pipeline.backbones.pretrained import (
    BackboneConfig,
    Checkpoint,
    digest_of_weights,
    load_model,
)
from tubelet_pipeline.preprocess import CENTER, CropBox, Place, Preprocessing, read_preprocessing
from tubelet_store.plan import Grid

_BLOCK_HOOK = re.compile(r"blocks\.(-?\d+)(\.attn|\.mlp)?")


@dataclass(frozen=True)
class Captured:
    """Activations of a batch at one hook, in the backbone's precision and on its device.

    Args:
        tokens: [B, T', S, D]: latent time, then patches row by row.
        special: [B, T' or 1, K, D], or None for a backbone without special tokens.
    """

    tokens: torch.Tensor
    special: torch.Tensor | None


class Backbone(ABC):
    """A loaded model of one family. Not thread-safe.

    Args:
        checkpoint: The files.
        config: Precision, device and preprocessing.
        frames: Frames per clip; None: the number of the checkpoint or family.

    Raises:
        TubeletError: the checkpoint is incomplete, or does not take `frames`.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    """Values of `model_type` in config.json."""
    architecture: ClassVar[str]
    """Class in transformers."""
    trunk: ClassVar[str] = ""
    """Submodule that holds the one list of blocks."""
    final_norm: ClassVar[str | None] = None
    """Submodule that normalizes every token after the last block."""
    attention: ClassVar[str | None] = None
    """Submodule of a block whose output is what attention adds to the residual stream."""
    mlp: ClassVar[str | None] = None
    """Submodule of a block whose output is what the MLP adds to the residual stream."""
    unneeded: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the parameters that no hook depends on."""
    square: ClassVar[bool] = False
    """Whether a bare `size` in the processor file means a square (else the shortest edge)."""
    fixed_size: ClassVar[bool] = True
    """Whether the model accepts only frames of `config.image_size`."""

    def __init__(self, checkpoint: Checkpoint, config: BackboneConfig, frames: int | None = None) -> None:
        self.checkpoint = checkpoint
        self.precision = config.precision
        self.compiled = config.compile
        self._compiled: CompiledCapture | None = None
        self.dtype: torch.dtype = getattr(torch, config.precision)
        self.device = choose_device(config.device)
        self.preprocessing: Preprocessing = config.preprocessing or read_preprocessing(
            checkpoint.folder, f"'{checkpoint.name}'", square=self.square
        )
        self.model: Any = load_model(checkpoint, self.architecture, self.dtype, self.device, self.unneeded)
        self.model_config: Any = self.model.config
        if self.fixed_size and (wanted := _pair(self.model_config.image_size)) != self.preprocessing.size:
            raise TubeletError(
                f"'{checkpoint.name}' takes frames of {wanted[0]}x{wanted[1]} pixels (height x width), but its "
                f"preprocessing gives {self.preprocessing.size[0]}x{self.preprocessing.size[1]}",
                "Fix its preprocessor_config.json or set backbone.preprocessing",
            )
        self.frames = self._choose_frames(frames)
        height, width = (side // patch for side, patch in zip(self.preprocessing.size, self.patch_size, strict=True))
        if not height or not width:
            raise TubeletError(
                f"Frames of {self.preprocessing.size} pixels are smaller than one patch of {self.patch_size}",
                "Set backbone.preprocessing to a larger size",
            )
        self.grid = Grid(time=self.latent_time, height=height, width=width)
        self.blocks = find_blocks(self.model.get_submodule(self.trunk), self.model_config.num_hidden_layers)
        self._modules = self._name_modules()

    @abstractmethod
    def _choose_frames(self, asked: int | None) -> int:
        """Frames per clip; a TubeletError names the right number."""

    @property
    @abstractmethod
    def latent_time(self) -> int:
        """T': time steps of the token grid."""

    @property
    @abstractmethod
    def special_time(self) -> int:
        """Time steps of the special tokens: T' if each frame has its own, else 1."""

    @abstractmethod
    def forward(self, pixels: torch.Tensor) -> object:
        """Run the model on `pixels` [B, T, 3, h, w]. Its result is ignored: hooks record the activations."""

    @abstractmethod
    def arrange(self, hidden: torch.Tensor) -> Captured:
        """A block's output in the common layout; the number of tokens was checked before."""

    @property
    @abstractmethod
    def sequence(self) -> tuple[int, int]:
        """Sequences per clip, and tokens per sequence (special ones included), in a block's output."""

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _pair(self.model_config.patch_size)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Names of the tokens before the grid, in order: `cls`, `register.0`, ..."""
        return ()

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Canonical names of all hooks."""
        return tuple(self._modules)

    def resolve_hook(self, name: str) -> str:
        """Canonical name of hook `name`: `blocks.-1` becomes `blocks.11`.

        Raises:
            TubeletError: there is no such hook; the remedy lists them.
        """
        canonical = name
        if match := _BLOCK_HOOK.fullmatch(name):
            block, part = int(match[1]), match[2] or ""
            canonical = f"blocks.{block + len(self.blocks) if block < 0 else block}{part}"
        if canonical in self._modules:
            return canonical
        last = len(self.blocks) - 1
        forms = [f"blocks.0 to blocks.{last}"]
        forms += [f"blocks.I.{part}" for part in ("attn", "mlp") if f"blocks.0.{part}" in self._modules]
        forms += ["final_norm"] if "final_norm" in self._modules else []
        hint = nearest(canonical, self.hook_names)
        hint = f"{hint} " if hint.startswith("Did you mean") else ""
        raise TubeletError(f"'{self.checkpoint.name}' has no hook '{name}'", f"{hint}It has {', '.join(forms)}")

    def module(self, hook: str) -> nn.Module:
        """The module whose output (in some families the first entry of a tuple) is `hook`.

        Raises:
            TubeletError: there is no such hook.
        """
        return self._modules[self.resolve_hook(hook)]

    def channels(self, hook: str) -> int:
        """Width D of the activations at `hook`."""
        self.resolve_hook(hook)
        return int(self.model_config.hidden_size)

    @property
    def tubelet_frames(self) -> int:
        """Frames that one token spans."""
        return self.frames // self.latent_time

    def preprocess(self, frames_u8: np.ndarray, place: Place = CENTER) -> tuple[torch.Tensor, CropBox]:
        """Pixels of one clip, and the box of the source frame that the token grid covers.

        Args:
            frames_u8: uint8 [T, H, W, 3] with T = `frames`.
            place: Position of the crop.

        Returns:
            float32 [T, 3, h, w] on the CPU; top, left, height, width in pixels of the source frame.

        Raises:
            ValueError: wrong number of frames, dtype or shape.
        """
        if len(frames_u8) != self.frames:
            raise ValueError(f"a clip has {self.frames} frames here, not {len(frames_u8)}")
        pixels, box = self.preprocessing(frames_u8, place)
        # If the frame is no whole number of patches (SigLIP 384 / 14), its right and lower edge is in no token.
        rows = self.grid.height * self.patch_size[0] / self.preprocessing.size[0]
        columns = self.grid.width * self.patch_size[1] / self.preprocessing.size[1]
        return pixels, CropBox(box.top, box.left, box.height * rows, box.width * columns)

    def activations(self, pixels: torch.Tensor, hooks: Iterable[str]) -> dict[str, Captured]:
        """Activations of a batch of clips at `hooks`, from one pass that stops after the last of them.

        Args:
            pixels: float32 [B, T, 3, h, w] as `preprocess` gives them, on any device.
            hooks: Names that `resolve_hook` accepts.

        Returns:
            One `Captured` per hook, keyed by the given name.

        Raises:
            TubeletError: unknown hook, wrong shape of `pixels`, or a number of tokens that is not that of the grid.
        """
        names = {asked: self.resolve_hook(asked) for asked in hooks}
        if not names:
            return {}
        expected = (self.frames, 3, *self.preprocessing.size)
        if tuple(pixels.shape[1:]) != expected:
            raise TubeletError(
                f"'{self.checkpoint.name}' takes pixels [B, {', '.join(map(str, expected))}], not {list(pixels.shape)}",
                "Use the pixels of this backbone's preprocess",
            )
        pixels = pixels.to(device=self.device, dtype=self.dtype, non_blocking=True)
        modules = {hook: self._modules[hook] for hook in names.values()}
        if self.compiled:
            raw = self._compiled_capture(modules)(pixels)
        else:
            raw = capture(modules, lambda: self.forward(pixels))
        clips = len(pixels)
        sequences, tokens = self.sequence
        for hook, hidden in raw.items():
            if tuple(hidden.shape[:2]) != (clips * sequences, tokens):
                raise TubeletError(
                    f"{hook} of '{self.checkpoint.name}' gave {hidden.shape[0]} x {hidden.shape[1]} tokens for "
                    f"{clips} clips; a grid of {self.grid.time}x{self.grid.height}x{self.grid.width} and "
                    f"{len(self.special_tokens)} special tokens make {clips * sequences} x {tokens}",
                    "The preprocessing does not fit the checkpoint; compare its size with the model's",
                )
        arranged = {hook: self.arrange(hidden) for hook, hidden in raw.items()}
        return {asked: arranged[hook] for asked, hook in names.items()}

    def _compiled_capture(self, modules: dict[str, nn.Module]) -> CompiledCapture:
        if self._compiled is None or self._compiled.hooks != tuple(modules):
            if self._compiled is not None:
                self._compiled.close()
            self._compiled = CompiledCapture(modules, self.forward)
        return self._compiled

    @cached_property
    def weights_digest(self) -> str:
        """Digest of the weights that the hooks depend on, in the precision they run in."""
        return digest_of_weights(self.model, self.unneeded)

    def describe(self) -> dict[str, Any]:
        """What determines the activations, as JSON: the same on every machine."""
        # Compiled arithmetic differs in its last bits.
        compiled = {"compiled": True} if self.compiled else {}
        return {
            **compiled,
            "family": self.family,
            "id": self.checkpoint.name,
            "revision": self.checkpoint.revision,
            "weights_digest": self.weights_digest,
            "config_digest": self.checkpoint.config_digest,
            "model_type": self.checkpoint.model_type,
            "architecture": self.architecture,
            "layers": len(self.blocks),
            "frames": self.frames,
            "precision": self.precision,
            "attention": str(self.model_config._attn_implementation),
        }

    def describe_preprocessing(self) -> dict[str, Any]:
        """How frames become pixels, as JSON."""
        return self.preprocessing.model_dump(mode="json")

    def _name_modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {f"blocks.{i}": block for i, block in enumerate(self.blocks)}
        if self.final_norm is not None and getattr(self.model, self.final_norm.partition(".")[0], None) is not None:
            modules["final_norm"] = self.model.get_submodule(self.final_norm)
        for part, path in (("attn", self.attention), ("mlp", self.mlp)):
            if path is not None:
                modules |= {f"blocks.{i}.{part}": block.get_submodule(path) for i, block in enumerate(self.blocks)}
        return modules


class VideoBackbone(Backbone):
    """Attends over the whole clip: one sequence of special tokens, then tubelets in time-major order."""

    @property
    def tubelet_frames(self) -> int:
        """Frames that one token spans."""
        return int(self.model_config.tubelet_size)

    @property
    def trained_frames(self) -> int:
        """Frames per clip that the checkpoint was trained with."""
        return int(self.model_config.num_frames)

    @property
    def latent_time(self) -> int:
        """T' = frames / tubelet frames."""
        return self.frames // self.tubelet_frames

    @property
    def special_time(self) -> int:
        """Special tokens represent the whole clip."""
        return 1

    @property
    def sequence(self) -> tuple[int, int]:
        """One sequence per clip."""
        return 1, len(self.special_tokens) + self.grid.tokens

    def _choose_frames(self, asked: int | None) -> int:
        right = self.trained_frames
        if asked is not None and asked != right:
            raise TubeletError(
                f"'{self.checkpoint.name}' takes {right} frames per clip, not {asked}", f"Set sampling.frames: {right}"
            )
        return right

    def forward(self, pixels: torch.Tensor) -> object:
        """One pass over [B, T, 3, h, w]."""
        return self.model(pixel_values=pixels)

    def arrange(self, hidden: torch.Tensor) -> Captured:
        """[B, K + T'S, D], time-major: split and fold."""
        special = len(self.special_tokens)
        tokens = hidden[:, special:].unflatten(1, (self.grid.time, self.grid.space))
        return Captured(tokens, hidden[:, None, :special] if special else None)


class ImageBackbone(Backbone):
    """Sees one frame at a time: one sequence per frame, so latent time counts frames."""

    default_frames: ClassVar[int] = 16
    """The number of VideoMAE, so that stores can be compared clip by clip."""

    @property
    def latent_time(self) -> int:
        """T' = frames."""
        return self.frames

    @property
    def special_time(self) -> int:
        """Every frame has its own special tokens."""
        return self.frames

    @property
    def sequence(self) -> tuple[int, int]:
        """One sequence per frame."""
        return self.frames, len(self.special_tokens) + self.grid.space

    def _choose_frames(self, asked: int | None) -> int:
        if asked is not None and asked < 1:
            raise TubeletError(f"A clip cannot have {asked} frames", "Set sampling.frames to 1 or more")
        return asked or self.default_frames

    def forward(self, pixels: torch.Tensor) -> object:
        """One pass over the frames of all clips, [B * T, 3, h, w]."""
        return self.model(pixel_values=pixels.flatten(0, 1))

    def arrange(self, hidden: torch.Tensor) -> Captured:
        """[B * T, K + S, D]: unfold the clips, split."""
        special = len(self.special_tokens)
        per_clip = hidden.unflatten(0, (-1, self.frames))
        return Captured(per_clip[:, :, special:], per_clip[:, :, :special] if special else None)


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
