"""The demo data set: moving shapes whose label depends on motion only, with a mask of every object in every frame.

    (seed, index) ──scene──▶ Scene ──render──▶ frames, masks ──video_files──▶ .webm / .mp4 + masks/ID.npz
                                                               annotations ──▶ SSv2 or Kinetics annotation files

Videos come in twins, which share one scene: the second is the first played backwards (or, for shaking and holding
still, the first frozen at one of its frames). So two opposed classes consist of the same single frames, and only motion
distinguishes them.

`render_dataset.make_dataset` renders a data set; `scene.scene_at` and `render.render` give one video as arrays;
`video_files.read_masks` reads the masks.
"""
