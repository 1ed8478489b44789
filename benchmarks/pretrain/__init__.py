"""How the demo backbones were made; run once by the authors, and by whoever doubts the result."""
