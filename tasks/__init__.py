"""How it runs: records, configuration, store and cluster, then one module per stage in the data's order."""
