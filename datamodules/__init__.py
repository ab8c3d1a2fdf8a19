"""Data: the embedded shapes world, GenEval prompts, images with captions, and rollouts with rewards."""
