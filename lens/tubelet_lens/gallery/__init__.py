"""A static site that shows what every latent fires on.

    store ─▶ survey (one pass) ─▶ strongest and typical clips of each latent, counts ┐
    chosen clips ─▶ heat-maps (a second look at those alone)                         ├─▶ pages ─▶ site (folder or URL)
    videos ─▶ sheets of the frames that the backbone saw                             │
    evaluation ─▶ figures and effects of each latent                                 ┘

The site needs no server: pages hold their data, images are local files, and there are no external links.
"""
