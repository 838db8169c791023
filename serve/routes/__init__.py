"""The routes, one module a concern, each with `add(app, site)`."""
