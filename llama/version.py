"""The version of the distribution: `setup.py` reads it here, and a server tells it."""

VERSION = "0.1.0"
