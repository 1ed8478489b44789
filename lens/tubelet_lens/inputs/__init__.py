"""What a metric reads: clips, labels, captions, shifted pairs and the SAE under evaluation."""
