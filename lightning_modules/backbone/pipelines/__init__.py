"""Text-to-image pipelines of diffusers, step by step."""
