"""The HTML report of an evaluation, and its SVG plots."""
