"""Readers of published dataset layouts; `LAYOUTS` maps a name to its reader."""
