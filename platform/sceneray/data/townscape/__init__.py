"""What `sceneray.data.town` draws with: camera and canvas, light and colours, the street and what stands in it."""
