"""The endpoint beside its peers: the same photographs, the same predictor and codecs, behind other servers."""
