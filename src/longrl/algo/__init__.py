"""The algorithms: small pure functions, each with its paper. See advantages.py, losses.py, kl.py."""
