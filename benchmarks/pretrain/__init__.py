"""How the backbones that come with Tubelet were trained. Not part of the wheel; run in a clone:

PYTHONPATH=benchmarks python -m pretrain.videomae --out DIR     13 minutes on one core
PYTHONPATH=benchmarks python -m pretrain.dinov2 --out DIR       6 minutes on one core
PYTHONPATH=benchmarks python -m pretrain.probe_backbones        linear probes of the backbones
"""
