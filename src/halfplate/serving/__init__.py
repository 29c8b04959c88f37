"""The HTTP server: transformers' own, behind a key, limits and measurements, and with requests in batches."""
