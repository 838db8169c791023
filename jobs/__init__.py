"""The verbs of the command line, one module each; they parse, load settings and call the library."""
