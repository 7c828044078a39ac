"""The ways people encode images to latents today, each as the short script it usually is."""
