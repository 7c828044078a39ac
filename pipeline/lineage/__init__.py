"""From anything that a job has made back to where it came from: sample -> model -> latents -> source."""
