"""The jobs of the command line, which join the other packages."""
