"""Videos to activation stores: clip tables, frames, backbones, shards, on a Dask cluster."""
