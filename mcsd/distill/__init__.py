"""Training of small drafters on text that the target writes itself; `python -m mcsd.distill --help`."""
