"""The demo data set: moving shapes whose label lies in the motion alone, with a mask for every object of every frame.

    (seed, index) ──scene──▶ Scene ──render──▶ frames, masks ──encode──▶ .webm / .mp4 + masks/ID.npz
                                                               layout ──▶ SSv2 or Kinetics annotation files

Videos come in twins. Twins share one scene: the second is the first played backwards (or, for shaking and holding
still, the first frozen at one of its frames). So two opposed classes consist of the very same single frames, and
whoever tells them apart has seen motion.

`dataset.make_dataset` does everything; `scene.scene_at` and `render.render` give one video as arrays;
`masks.read_masks` reads the ground truth back.
"""
