"""Steering: edits of SAE latents in a running backbone, and what changes downstream.

    operation, region ─▶ LatentEdits ─▶ x' = x + (f' - f) d_j at the hook ─▶ classes, later hooks, downstream SAEs

    from tubelet_lens.steering.operations import Suppress
    from tubelet_lens.steering.latent_edits import Edit, LatentEdits
    edits = LatentEdits(sae, [Edit(latent=12, operation=Suppress())])
    with rewriting(backbone, "blocks.2", edits):
        backbone.activations(pixels, ["blocks.3"])

`EditEngine` runs clips with edits and their controls; `tubelet edit` and the metrics of `tubelet evaluate
--in_backbone` use it or its parts. Nothing is imported here: the command line reads configurations without torch.
"""
