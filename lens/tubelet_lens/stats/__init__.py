"""Statistics independent of SAEs: probes, regressions, intervals, distances."""
