"""The shapes world: pictures, prompts in GenEval's format and an independent detector, all without downloads."""
