"""The segmentation endpoint: a FastAPI ingress and batching model replicas on Ray Serve."""
