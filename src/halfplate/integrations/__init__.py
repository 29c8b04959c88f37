"""Halfplate inside other libraries: what their interfaces call. It stands on everything here, and nothing here imports it."""
