"""Which latents are dead, counted on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tubelet_trainer.process_group import ALONE, ProcessGroup
from tubelet_trainer.sae.model import Codes

# Steps between two reads of the number of dead latents, and the age of the number that is read: long enough for the
# copy to arrive, and short compared with the millions of tokens after which a latent counts as dead.
_READ_EVERY = 4


class DeadLatentTracker:
    """Tokens since each latent last fired.

    The host reads the number of dead latents without waiting for the device: every 4 steps a copy is started, and the
    one started 4 steps before is read.

    Args:
        latents: F.
        dead_after_tokens: A latent is dead after this many tokens without firing.
        device: Where the SAE is.
        holders: Processes that hold the other latents of a split dictionary.
    """

    def __init__(
        self, latents: int, dead_after_tokens: int, device: torch.device, holders: ProcessGroup = ALONE
    ) -> None:
        self.silent_tokens_F = torch.zeros(latents, dtype=torch.int64, device=device)
        self.dead_after_tokens = dead_after_tokens
        self.holders = holders
        self.dead_count = 0
        """Number of dead latents 4 to 7 steps ago."""
        self._copy = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
        # The same memory: reading it does not go through torch.
        self._copied = self._copy.numpy()
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None

    @property
    def dead_bound(self) -> int:
        """`dead_count` rounded up to a power of 2, so that shapes that depend on it seldom change."""
        return 1 << (self.dead_count - 1).bit_length() if self.dead_count else 0

    @property
    def dead_F(self) -> Tensor:
        """bool [F]"""
        return self.silent_tokens_F > self.dead_after_tokens

    def update(self, codes: Codes, tokens: int | None = None, ranks: ProcessGroup = ALONE) -> None:
        """Count one batch of `tokens` (None: as many as there are codes), of which `ranks` hold parts."""
        self.silent_tokens_F += len(codes) if tokens is None else tokens
        fired_F = codes.fired(len(self.silent_tokens_F))
        if ranks.size > 1:
            fired_F = ranks.sum(fired_F.int()) > 0
        self.silent_tokens_F.masked_fill_(fired_F, 0)

    def read(self, step: int) -> None:
        """After step `step`: read the copy started 4 steps ago, and start the next one."""
        if (step + 1) % _READ_EVERY:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        self.dead_count = int(self._copied)
        self._copy.copy_(self.holders.sum(self.dead_F.sum()), non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, by reference."""
        counts = torch.stack([torch.tensor(self.dead_count), self._settled()])
        return {"silent_tokens": self.silent_tokens_F, "dead_counts": counts}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        self.silent_tokens_F.copy_(tensors["silent_tokens"])
        self.dead_count = int(tensors["dead_counts"][0])
        self._settled().copy_(tensors["dead_counts"][1])

    def _settled(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy
