"""Recording the outputs of a model's modules with forward hooks.

`output_hidden_states` is not used: its last entry is before the final norm in some versions of transformers and after
it in others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tubelet.errors import TubeletError


def find_blocks(trunk: nn.Module, layers: int) -> nn.ModuleList:
    """The transformer blocks of `trunk`: its only `nn.ModuleList` of length `layers`.

    Raises:
        TubeletError: there is no such list, or more than one.
    """
    lists = {name: m for name, m in trunk.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers}
    if len(lists) != 1:
        names = ", ".join(lists) or "none"
        raise TubeletError(
            f"{type(trunk).__name__} should have one list of {layers} blocks; it has {names}",
            "This version of transformers structures the model differently; install a supported one",
        )
    return next(iter(lists.values()))


class _AllCaptured(Exception):
    """Not an error: ends a forward pass after the last module of interest."""


class CompiledCapture:
    """`capture` as a compiled function of the pixels, for one set of modules, whose hooks stay until `close`.

    It compiles on its first call, and again, for any batch size, when the batch size changes. It returns only the
    outputs of `modules`, so the compiler drops what the model computes after the last of them.

    Args:
        modules: Modules by hook name, each called once per pass.
        forward: Runs the model on the pixels.
    """

    def __init__(self, modules: Mapping[str, nn.Module], forward: Callable[[torch.Tensor], object]) -> None:
        captured: dict[str, torch.Tensor] = {}

        def listener(name: str) -> Callable[[nn.Module, object, Any], None]:
            def listen(_module: nn.Module, _inputs: object, output: Any) -> None:
                captured[name] = output[0] if isinstance(output, tuple) else output

            return listen

        def run(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            captured.clear()
            forward(pixels)
            outputs = dict(captured)
            captured.clear()
            return outputs

        self.hooks = tuple(modules)
        # Registered once: new hooks would be compiled again at each call.
        self._handles = [module.register_forward_hook(listener(name)) for name, module in modules.items()]
        # torch counts compilations of one function over all models of this process, and stops at eight.
        torch.compiler.reset()
        self._run = torch.compile(run, fullgraph=True)

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The output tensor of each module, by hook name."""
        with torch.no_grad():
            outputs: dict[str, torch.Tensor] = self._run(pixels)
        return outputs

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def capture(modules: Mapping[str, nn.Module], forward: Callable[[], object]) -> dict[str, torch.Tensor]:
    """Outputs of `modules` during `forward()`, which ends as soon as all of them have been called.

    Everything before the last of them is computed exactly as in a full pass. If a module returns a tuple, its first
    element is taken. Not thread-safe on one model.

    Args:
        modules: Modules by hook name, each called at most once per pass.
        forward: Runs the model once, without gradients.

    Returns:
        The output tensor of each module, by hook name.

    Raises:
        RuntimeError: a module was not called.
    """
    captured: dict[str, torch.Tensor] = {}

    def listener(name: str) -> Callable[[nn.Module, object, object], None]:
        def listen(_module: nn.Module, _inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"hook {name} gave a {type(tensor).__name__}, not a tensor")
            captured[name] = tensor
            if len(captured) == len(modules):
                raise _AllCaptured

        return listen

    handles = [module.register_forward_hook(listener(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            forward()
    except _AllCaptured:
        return captured
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError(f"not called in the forward pass: {sorted(set(modules) - set(captured))}")
