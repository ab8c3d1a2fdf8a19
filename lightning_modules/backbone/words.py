"""The words of prompts, for decoders that know a few by heart. Imports no torch."""

from collections.abc import Collection


def known_words(prompt: str, vocabulary: Collection[str], most: int) -> list[str]:
    """Split a prompt into its words; ValueError for unknown ones, or more than `most`."""
    words = prompt.split()
    if unknown := [word for word in words if word not in vocabulary]:
        names = ", ".join(map(repr, dict.fromkeys(unknown)))
        raise ValueError(f"prompt {prompt!r} has words outside the vocabulary: {names}")
    if len(words) > most:
        raise ValueError(f"prompt {prompt!r} has {len(words)} words, at most {most} are allowed")
    return words
