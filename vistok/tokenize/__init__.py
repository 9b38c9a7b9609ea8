"""Data sets to tokens on disk: views of pictures, the job, its pipeline."""
