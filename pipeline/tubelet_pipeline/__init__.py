"""From videos to activation stores, on a Dask cluster.

extract_config, plan_extraction                     configuration of a job, and its plan
datasets, sampling, views                           clip tables; which frames and crops a clip is
decode, preprocess                                  exact frames; pixels
backbones, token_selection                          frozen models and their hooks; stored tokens
driver, scheduler, shard_task, worker_state         running the job
cluster, preflight                                  its workers
extract_report, estimate                            log, progress, summary; cost before it runs
redecode                                            from a store back to its videos and backbone
synthetic, demo_backbones                           the demo's videos and models
"""
