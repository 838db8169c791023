"""Search over training settings with Ray Tune."""
