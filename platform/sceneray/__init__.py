"""sceneray: scene parsing with PSPNet, from labelled images to an endpoint."""

__version__ = "0.1.0"
