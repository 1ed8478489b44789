"""Statistics that know nothing of SAEs: probes, regressions, intervals, distances."""
