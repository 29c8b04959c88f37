"""What is on disk: safetensors files, the files of a sharded model, and writes that happen whole or not at all."""
