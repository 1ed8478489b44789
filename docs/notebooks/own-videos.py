# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From your videos to an explained latent
#
# Step by step: extract, train, evaluate, look at exemplars, edit. `tubelet videos` renders 96 videos as a
# stand-in for yours. Replace `dataset` with your own folder (`{kind: folder, root: /data/my-videos}`) and `backbone.id`
# with a model of the Hugging Face hub.

# %%
import os
import tempfile
import warnings

os.chdir(tempfile.mkdtemp())
warnings.filterwarnings("ignore", "IProgress not found")

# %%
# !tubelet videos videos --videos 96 --frames 32 --validation_share 0.25 2> videos.log

# %% [markdown]
# ## Extract
#
# One forward pass per clip; the activations of block 2 are stored.

# %%
import tubelet

settings = {
    "dataset": {"kind": "ssv2", "root": "videos", "split": "train"},
    "sampling": {"kind": "dense", "frames": 16, "stride": 2},
    "backbone": {"id": "videomae-tiny"},
    "hooks": ["blocks.2"],
}
tubelet.extract(settings, store="train.zarr")

# %%
tubelet.extract(settings, store="validation.zarr", **{"dataset.split": "validation"})

# %% [markdown]
# ## Train
#
# A TopK SAE with a weak temporal contrast, which makes codes follow the content over time. The contrast compares 128
# tokens of a batch with their neighbors.

# %%
run = tubelet.train(
    store="train.zarr",
    out="run",
    sae={"kind": "topk", "k": 16, "expansion": 4},
    objective={"lambda_t": 0.03},
    pairs={"anchors": 128},
    batch_tokens=512,
    epochs=5,
)
run

# %% [markdown]
# ## Evaluate
#
# Probes are fitted on the training videos and measured on the validation videos. A figure means little without what
# is next to it: the raw activations, an untrained SAE of the same width, a null.

# %%
report = tubelet.evaluate(
    run=run,
    store="validation.zarr",
    other_store=True,
    split="all",
    fit_store="train.zarr",
    skip=["ablation"],
    control_draws=1,
    out="report",
)
report

# %% [markdown]
# ## Choose a latent
#
# Latents have figures too. Here: those that fire on some but not most tokens, ordered by how coherent they are over
# time.

# %%
table = report.latents.to_pandas()
table.columns.tolist()

# %%
some = table[table["frequency"].between(0.005, 0.1)]
ranked = some.sort_values("coherence", ascending=False)
ranked.head(5)

# %%
latent = int(ranked["latent"].iloc[0])
latent

# %% [markdown]
# ## Look at its exemplars
#
# The gallery is a static site with a page per latent: its strongest clips, playing, with a heat map of where it fires.

# %%
site = tubelet.gallery(
    run=run,
    store="validation.zarr",
    other_store=True,
    latents={"kind": "list", "numbers": [latent]},
    evaluation="report",
    out="gallery",
)
site

# %% [markdown]
# The page itself, in `gallery/latents/`, plays the clips. Here as still images: where the latent fires on its
# strongest clip, one picture per latent time step.

# %%
import matplotlib.pyplot as plt

store = tubelet.open_store("validation.zarr")
x = store["blocks.2"]
codes = tubelet.load_sae("run").encode(x[:])[..., latent]  # [clip, time, space]
clip = int(codes.flatten(1).amax(1).argmax())
maps = codes[clip].unflatten(-1, (store.plan.grid.height, store.plan.grid.width))

figure, axes = plt.subplots(1, len(maps), figsize=(12, 2))
for step, (axis, values) in enumerate(zip(axes, maps, strict=True)):
    axis.imshow(values, vmin=0, vmax=float(maps.max()), cmap="magma")
    axis.set_title(f"step {step}", fontsize=8)
    axis.axis("off")
figure.suptitle(f"latent {latent}: {store.clips()['caption'][clip].as_py()}", fontsize=9)
plt.show()

# %% [markdown]
# Which labels does it fire on? The mean of its largest activation in a clip, by label:

# %%
clips = store.clips().select(["label_name"]).to_pandas()
clips["largest activation"] = codes.flatten(1).amax(1).numpy()
clips.groupby("label_name").mean().sort_values("largest activation", ascending=False).head(5)

# %% [markdown]
# ## Edit it
#
# The last question is causal: what changes in the backbone's output when the latent is suppressed? Next to it are
# other latents with similar activation, and random directions with steps of the same length. If these change as much,
# the effect does not belong to this latent.

# %%
edited = tubelet.edit(
    run=run,
    store="validation.zarr",
    clips=[clip],
    latent=latent,
    operation={"kind": "suppress", "strength": 1},
    controls=4,
)
edited

# %% [markdown]
# `run/edits/` has the page with all figures. On your own data, repeat this over many latents and videos with
# `tubelet evaluate --in_backbone {}`, which also measures whether an effect exceeds its controls.
