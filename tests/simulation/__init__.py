"""The real code in a simulated world: only clock, threads and wire are replaced."""
