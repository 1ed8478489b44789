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
# # First steps
#
# This notebook makes a small data set, opens its activation store, trains a sparse autoencoder (SAE) on it and
# evaluates it. It needs no GPU and no download, and takes about a minute on two cores. The outputs below are those of a
# run when this site was built.
#
# It works in a temporary folder:

# %%
import os
import tempfile

os.chdir(tempfile.mkdtemp())

# %% [markdown]
# ## Make the data
#
# `tubelet demo` renders videos of moving shapes, extracts their activations with a tiny VideoMAE that is part of the
# package, trains an SAE and evaluates it. Here it runs at a small size.

# %%
# !tubelet demo --videos 32 --epochs 2 2> demo.log | tail -n 30
# !tubelet catalog add demo-train demo/train.zarr

# %% [markdown]
# ## Open the store
#
# A store has one array per hook, `[clip, time, space, channel]`. It is read lazily, from memory maps.

# %%
import tubelet

store = tubelet.open_store("catalog.yaml#demo-train")  # or a path, or s3://...
store

# %%
x = store["blocks.2"]
x

# %%
x[:2].shape, x[:2].dtype

# %% [markdown]
# There is one row per clip with its labels, frames and errors:

# %%
store.clips().select(["video_id", "label_name", "caption", "status"]).slice(0, 3).to_pandas()

# %% [markdown]
# ## Train an SAE
#
# The fields are those of `tubelet train`; `tubelet.train("train.yaml")` takes a file.

# %%
run = tubelet.train(
    store="demo/train.zarr", out="runs/a", sae={"kind": "batchtopk", "k": 16}, epochs=8, batch_tokens=512
)
run

# %% [markdown]
# FVU is the share of the variance that the SAE does not explain, L0 the mean number of active latents per token. A few
# epochs on 15 videos are far too few for a good SAE; this only shows the path.
#
# ## Encode
#
# An SAE encodes any leading dimensions:

# %%
sae = tubelet.load_sae("runs/a")
codes = sae.encode(x[:4])
codes.shape, (codes > 0).float().sum(-1).mean()

# %%
reconstruction = sae.decode(codes)
reconstruction.shape

# %% [markdown]
# ## Evaluate
#
# By default the videos held out of training are measured. With so few videos, measure another store instead: the
# validation videos, with probes fitted on the training videos. `skip` leaves out the slowest section.

# %%
report = tubelet.evaluate(
    run=run,
    store="demo/validation.zarr",
    other_store=True,
    split="all",
    fit_store="demo/train.zarr",
    skip=["ablation"],
    control_draws=1,
    out="reports/a",
)
report

# %%
report.to_pandas().head()

# %% [markdown]
# Each latent has a row of figures:

# %%
report.latents.sort_by("frequency", descending=True).head(5)

# %% [markdown]
# `reports/a/report.html` has all figures with their definitions, nulls and controls.
