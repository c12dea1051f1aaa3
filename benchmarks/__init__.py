"""Every number that we claim: the commands that measure it, and the raw results."""
