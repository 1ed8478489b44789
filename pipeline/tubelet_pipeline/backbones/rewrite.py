"""Editing activations in a forward pass: within `rewriting`, a hook's output is replaced by a function of it.

    block ──▶ output ──arrange──▶ tokens [B, T', S, D] ──rewrite──▶ tokens ──in place of the old ones──▶ next block

`Backbone.arrange` gives a view in the common layout, so that values written through it reach the model's own layout.
Special tokens, and other outputs of a block, are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tubelet.errors import TubeletError
from tubelet_pipeline.backbones.backbone import Backbone

Rewrite = Callable[[torch.Tensor], torch.Tensor | None]
"""From tokens [B, T', S, D] to new ones of the same shape, or None to leave them as they are. Must not change its
argument."""


@contextmanager
def rewriting(backbone: Backbone, hook: str, rewrite: Rewrite) -> Iterator[None]:
    """In this context, every pass through `backbone` continues with `rewrite`'s tokens at `hook`.

    Tokens that are returned equal keep their bits. Other hooks at the same module see the new tokens. Contexts may be
    nested; at one hook the outer one is applied first. The hook is removed on leaving, also after an error.

    Args:
        backbone: Not compiled.
        hook: Any name that `resolve_hook` accepts.
        rewrite: Called once per pass. Precision and device of its tokens are the backbone's.

    Raises:
        TubeletError: unknown hook, or a compiled backbone.
        ValueError: (in a pass) the new tokens have another shape.
    """
    module = backbone.module(hook)
    if backbone.compiled:
        raise TubeletError(
            f"'{backbone.checkpoint.name}' is compiled, and a compiled pass ignores edits",
            "Load it with backbone.compile: false",
        )

    def write(_module: nn.Module, _inputs: object, output: Any) -> Any:
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        tokens = backbone.arrange(hidden).tokens
        new = rewrite(tokens)
        if new is None:
            return None  # torch keeps the module's own output
        if new.shape != tokens.shape:
            raise ValueError(f"a rewrite gave {list(new.shape)} for tokens {list(tokens.shape)}")
        changed_BTS = (new != tokens).any(-1)
        if not bool(changed_BTS.any()):
            return None
        copy = hidden.clone(memory_format=torch.contiguous_format)
        view = backbone.arrange(copy).tokens
        view[changed_BTS] = new[changed_BTS].to(view.dtype)
        return (copy, *output[1:]) if isinstance(output, tuple) else copy

    handle = module.register_forward_hook(write)
    try:
        yield
    finally:
        handle.remove()
