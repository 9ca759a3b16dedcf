"""Use a loaded checkpoint: complete, infill, score and choose texts, and show the denoising."""
