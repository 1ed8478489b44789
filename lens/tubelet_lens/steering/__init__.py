"""Latents changed in a running backbone, and what changes after them.

    operation, region ─▶ LatentEdits ─▶ x' = x + (f' - f) d_j at the hook ─▶ readouts: classes, later hooks, later SAEs

    from tubelet_lens.steering.operations import Suppress
    from tubelet_lens.steering.latent_edits import Edit, LatentEdits
    edits = LatentEdits(sae, [Edit(latent=12, operation=Suppress())])
    with rewriting(backbone, "blocks.2", edits):
        backbone.activations(pixels, ["blocks.3"])

Nothing is imported here: the command line reads configurations without torch.
"""
