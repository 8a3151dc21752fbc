"""What runs: one module per flow, and the `prefsieve` command line."""
