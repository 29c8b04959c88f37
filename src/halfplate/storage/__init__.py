"""Files on disk: safetensors files, sharded models, artifacts and atomic writes."""
