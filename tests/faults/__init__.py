"""Runs of the trainer to which the system refuses something; see `__main__`."""
