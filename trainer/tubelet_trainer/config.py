"""Configuration of `tubelet train`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from tubelet.config import Config
from tubelet_store.cache import CacheConfig
from tubelet_trainer.format_1 import current_fields
from tubelet_trainer.sae.config import AnySAEConfig, TopKConfig


class OptimizerConfig(Config):
    """Adam, its learning-rate schedule, gradient clipping."""

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate. Default: 2e-4 / sqrt(F / 16384) for F latents (dictionary_learning, after Gao et al.
    2024)."""
    beta1: float | None = Field(default=None, ge=0, lt=1)
    """Adam's first moment decay. Default: 0.9; for kind jumprelu 0 (Rajamanoharan et al. 2024b)."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Adam's second moment decay."""
    eps: float = Field(default=6.25e-10, gt=0)
    """Adam's epsilon (Gao et al. 2024)."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps of linear warm-up, at most a tenth of the run."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Fraction of the run at its end in which the learning rate falls linearly to 0."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to at most this L2 norm."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then evaluated and exported (0.999 is common).
    Early in a run it averages over about a tenth of the steps so far. Default: no average."""
    resample_every: int | None = Field(default=None, ge=1)
    """Steps between resamplings: dead latents get the direction of a badly reconstructed token (Bricken et al. 2023).
    Default: never."""

    def peak_lr(self, latents: int) -> float:
        """Learning rate after warm-up for a dictionary of `latents`."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(latents / 2**14)

    def lr_factor(self, step: int, steps: int) -> float:
        """Share of the peak rate used in step `step` (from 0) of `steps`."""
        warmup = min(self.warmup_steps, steps // 10)
        decay = max(1, round(self.decay_fraction * steps)) if self.decay_fraction else 0
        rise = (step + 1) / (warmup + 1)
        fall = (steps - step) / (decay + 1) if decay else 1.0
        return min(1.0, rise, fall)


# [RECON] The papers do not say how pairs are drawn. Distance 1 is T-SAE's; 4 neighbors are the closest patches; with
# 1024 anchors of 4096 tokens a contrast costs about as much as the rest of the step (benchmarks/train_step.py).
class PairsConfig(Config):
    """Pairs of neighboring tokens that the coherence terms compare. Drawn only where a term has a weight above 0."""

    max_delta: int = Field(default=1, ge=1)
    """Maximum temporal distance in latent steps; sampled uniformly from 1..max_delta."""
    neighbors: Literal[4, 8, "random"] = 4
    """Spatial pairs: one of the 4 or 8 adjacent patches, or any other patch of the frame."""
    anchors: int = Field(default=1024, ge=2)
    """Tokens per batch that get a pair, at most the batch. Cost grows with its square times the latents."""


class ObjectiveConfig(Config):
    """Loss terms in addition to the reconstruction and the SAE's own: coherence in time and space.

    With all weights 0 it is the plain SAE, bit for bit. T-SAE (Bhalla et al. 2026) is lambda_t 0.1, lambda_slow 1 and
    codes prefix.
    """

    lambda_t: float = Field(default=0.0, ge=0)
    """Weight of the temporal contrast (InfoNCE): codes of one patch at neighboring times against those of other
    clips."""
    lambda_s: float = Field(default=0.0, ge=0)
    """Weight of the spatial contrast (InfoNCE): codes of neighboring patches of a frame against those of other
    clips."""
    lambda_smooth: float = Field(default=0.0, ge=0)
    """Weight of the smoothness penalty: L1 distance between codes of neighbors in time, without negatives."""
    lambda_slow: float = Field(default=0.0, ge=0)
    """Weight of the reconstruction from the prefix alone, which splits the dictionary into slow and fast latents."""
    codes: Literal["pre", "post", "prefix"] = "pre"
    """What is compared. pre: ReLU of all pre-activations, so that gradients reach latents that were not chosen; post:
    the codes; prefix: the first latents of the codes (T-SAE)."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """cosine (T-SAE's paper), or dot: the raw dot product (T-SAE's code), whose scale is that of the codes."""
    temperature: float | None = Field(default=None, gt=0)
    """Similarities are divided by it. Default: 0.1 for cosine, 1 for dot."""
    prefix_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the dictionary in the prefix. Default: the first group of nesting.kind groups, else 0.2 (T-SAE)."""

    @property
    def temporal(self) -> bool:
        """Temporal pairs are needed."""
        return self.lambda_t > 0 or self.lambda_smooth > 0

    @property
    def spatial(self) -> bool:
        """Spatial pairs are needed."""
        return self.lambda_s > 0


class HoldoutConfig(Config):
    """Videos held out of training, for evaluation."""

    fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of videos held out; 0 trains on everything and evaluates nothing."""
    seed: int = 0
    """Seed that selects the videos. Independent of the training seed: runs with other seeds are evaluated on the same
    videos."""


class NoTracker(Config):
    """Only metrics.jsonl."""

    kind: Literal["none"] = "none"


class TensorBoardConfig(Config):
    """Event files in the run's folder, for `tensorboard --logdir`."""

    kind: Literal["tensorboard"] = "tensorboard"


class WandbConfig(Config):
    """Weights & Biases. Log in with `wandb login` or its environment variables."""

    kind: Literal["wandb"] = "wandb"
    project: str = "tubelet"
    """Project."""
    name: str | None = None
    """Name of the run. Default: the name of its folder."""
    mode: Literal["online", "offline"] = "online"
    """offline: keep the run in its folder; upload it later with `wandb sync`."""


class MLflowConfig(Config):
    """MLflow."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """Tracking server or folder. Default: the library's own setting (MLFLOW_TRACKING_URI)."""
    experiment: str = "tubelet"
    """Experiment."""
    name: str | None = None
    """Name of the run. Default: the name of its folder."""


AnyTracker = Annotated[NoTracker | TensorBoardConfig | WandbConfig | MLflowConfig, Field(discriminator="kind")]


class TrainConfig(Config):
    """One training run: a store, one or several SAEs, a folder for the results."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "store",
        "out",
        "hook",
        "epochs",
        "sae.kind",
        "sae.expansion",
        "sae.k",
        "objective.lambda_t",
        "objective.lambda_s",
        "optimizer.lr",
        "batch_tokens",
        "sweep",
        "device",
    )

    store: str
    """Path or URL of the activation store; a remote one is read through a cache on a local disk."""
    out: Path
    """Folder of the run; a run found there is resumed."""
    hook: str | None = None
    """Hook whose activations are learned. Default: the store's only one."""
    seed: int = 0
    """Seed of the order of tokens."""
    steps: int | None = Field(default=None, ge=1)
    """Length of the run in batches. Give at most one of steps, tokens, epochs."""
    tokens: int | None = Field(default=None, ge=1)
    """Length of the run in tokens."""
    epochs: int | None = Field(default=None, ge=1)
    """Length of the run in passes over the training tokens. Default: 1, if no length is given."""
    batch_tokens: int = Field(default=4096, ge=2)
    """Tokens per step."""
    window_tokens: int = Field(default=262_144, ge=1)
    """Tokens of a shuffle window, at least a block. Two windows are held in memory; a third one while evaluating."""
    block_patches: int | None = Field(default=None, ge=1)
    """Patches copied together, a divisor of the grid's. Default: a row of the grid, or the whole grid of small
    clips."""
    resident_shards: int | None = Field(default=None, ge=1)
    """Shards shuffled together, which must be on local disk at the same time. Part of the order of tokens, for a local
    store too. Default: all; of a remote store that does not fit the cache's budget, as many as fit it twice."""
    cache: CacheConfig = CacheConfig()
    """Where and how much of a remote store is kept on a local disk."""
    holdout: HoldoutConfig = HoldoutConfig()
    """Videos held out for evaluation."""
    mix: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=dict)
    """Further stores with their share of every batch: `{other.zarr: 0.25}`; `store` fills the rest. All stores must
    be of one backbone."""
    pairs: PairsConfig = PairsConfig()
    """Pairs of neighboring tokens for the objective."""
    sae: AnySAEConfig = TopKConfig()
    """The sparse autoencoder."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Coherence in time and space."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Adam, learning-rate schedule, gradient clipping."""
    log_every: int = Field(default=50, ge=1)
    """Steps between lines of metrics.jsonl."""
    eval_every: int = Field(default=1000, ge=1)
    """Steps between evaluations on held-out videos; there is always one at the end."""
    eval_tokens: int = Field(default=65_536, ge=2)
    """Maximum number of held-out tokens per evaluation, the same ones each time."""
    checkpoint_every: int = Field(default=1000, ge=1)
    """Steps between checkpoints; there is always one at the end."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of checkpoints kept, the newest ones."""
    saes: tuple[dict[str, JsonValue], ...] = ()
    """Several SAEs trained on the same batches: a list of what differs, `{name: a, sae: {k: 16}, objective: {...}}`
    (also optimizer and hook). Each gets a folder below `out`."""
    sweep: dict[str, JsonValue] = Field(default_factory=dict)
    """Several SAEs trained on the same batches: all combinations of `{sae.k: [16, 32], objective.lambda_t: [0,
    0.1]}`."""
    parallel: Literal["data", "dictionary"] = "data"
    """With torchrun. data: each process takes a part of every batch; dictionary: each process holds a part of the
    latents."""
    resume: bool = True
    """Resume a run found in `out`; false: refuse a folder that holds one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products in training: the encoder's (codes are rounded to it), the decoder's for dense
    codes, the objective's. Weights, sums and the optimizer stay float32. Kind jumprelu always encodes in float32: its
    thresholds learn from differences below the resolution of bfloat16."""
    compile: bool = False
    """Compile losses and gradients with torch.compile: takes a minute at the start, then saves passes over memory.
    Not worth it on a CPU."""
    cuda_graphs: bool = False
    """Record the step as a CUDA graph and replay it: for SAEs so small that launching kernels takes longer than running
    them. Needs a GPU and a single process."""
    tracker: AnyTracker = NoTracker()
    """Where metrics are logged, in addition to metrics.jsonl."""

    @classmethod
    def current_names(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """The mapping with names in American spelling; `config.yaml` of a run may have British ones."""
        return current_fields(tree)

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not both")
        return self

    @model_validator(mode="after")
    def _shares_leave_something(self) -> TrainConfig:
        if sum(self.mix.values()) >= 1:
            raise ValueError(
                f"the shares in mix add up to {sum(self.mix.values()):g}, which leaves nothing for the store"
            )
        return self

    def total_tokens(self, tokens_per_epoch: int) -> int:
        """Length of the run in tokens."""
        if self.tokens is not None:
            return self.tokens
        if self.steps is not None:
            return self.steps * self.batch_tokens
        return (self.epochs or 1) * tokens_per_epoch
