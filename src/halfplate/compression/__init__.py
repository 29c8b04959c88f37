"""The main job: read, calibrate, compress layer by layer, write, check. Finished work is not repeated."""
