"""The processes that calibrate: memory, disk, threads, progress, several together."""
