"""Two files that the build maps into the package `optimum`."""
