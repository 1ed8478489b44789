"""The processes of one run, and their collective operations.

    torchrun --no-python --nproc-per-node 4 tubelet train run.yaml

Every rank computes the loss of the *whole* batch from sums over ranks, and the gradient of its own part; parameter
gradients are then summed. So any number of processes gives the same weights up to rounding, for any loss. With one
process nothing is exchanged and nothing is copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ProcessGroup:
    """This process (`rank`) among `size` processes."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """This process writes the files."""
        return self.rank == 0

    def sum(self, local: Tensor) -> Tensor:
        """Sum over ranks; no gradient."""
        if self.size == 1:
            return local
        total = local.detach().clone()
        dist.all_reduce(total)
        return total

    def min(self, local: Tensor) -> Tensor:
        """Smallest over ranks; no gradient."""
        if self.size == 1:
            return local
        least = local.detach().clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return least

    def total(self, local: Tensor) -> Tensor:
        """Sum over ranks, of which this rank's part has a gradient."""
        if self.size == 1:
            return local
        out: Tensor = _Total.apply(local)
        return out

    def shared(self, value: Tensor) -> Tensor:
        """`value` itself, known to all ranks, each of which uses it for another part: its gradients are summed."""
        if self.size == 1:
            return value
        out: Tensor = _Shared.apply(value)
        return out

    def gather(self, local: Tensor, most: int | None = None) -> Tensor:
        """Rows of all ranks, rank after rank, of which this rank's own have a gradient.

        Args:
            local: [n, ...]
            most: Pad each rank's rows to this many, with zeros; None: all have the same number.
        """
        if self.size == 1:
            return local
        if most is not None:
            local = torch.cat([local, local.new_zeros((most - len(local), *local.shape[1:]))])
        out: Tensor = _Gather.apply(local, self.rank, self.size)
        return out

    def gather_on_first(self, local: Tensor) -> Tensor:
        """Rows of all ranks in the first rank's host memory, nothing [0, ...] on the others; no gradient.

        No device holds more than its own rows and one other rank's.
        """
        if self.size == 1:
            return local.detach().cpu()
        parts = []
        for rank in range(self.size):
            part = local.detach().clone() if rank == self.rank else torch.empty_like(local)
            dist.broadcast(part, rank)
            parts.append(part.cpu() if self.first else part[:0].cpu())
        return torch.cat(parts)

    def interleave(self, local: Tensor, whole: int) -> Tensor:
        """The `whole` rows of a batch of which rank r holds rows r, r + size, ...: [whole, ...], in their order."""
        if self.size == 1:
            return local
        parts = self.gather(local, -(-whole // self.size)).view(self.size, -1, *local.shape[1:])
        return parts.transpose(0, 1).flatten(0, 1)[:whole]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over ranks; all ranks must have the same parameters."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()


ALONE = ProcessGroup()


@contextmanager
def join_process_group() -> Iterator[ProcessGroup]:
    """The ranks that torchrun started; `ALONE` where it did not. On CUDA, rank r of a node takes its GPU r."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class _Gather(torch.autograd.Function):
    """Each rank computes the whole loss from all rows, so the gradient of its own rows is a slice of what it has."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, rank: int, size: int) -> Tensor:
        ctx.rows = slice(rank * len(local), (rank + 1) * len(local))
        parts = [torch.empty_like(local) for _ in range(size)]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.rows], None, None
