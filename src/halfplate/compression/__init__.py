"""The main job: read, calibrate, compress layer by layer, write, check; what is finished is never done again."""
