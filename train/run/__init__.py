"""What a run is: a folder on disk, lines on a screen, one or more processes."""
