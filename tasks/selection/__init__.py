"""The mathematics of selection: plain functions on NumPy arrays; no Prefect, Ray, S3 or torch."""
