"""Texts of users and files, cleaned for tokenizers."""

from __future__ import annotations


def replace_surrogates(text: str) -> str:
    """The text with a replacement character for each lone surrogate, which no tokenizer takes.

    Broken emoji in JSON (`\\ud83d` without its second half) are read as lone surrogates.

    Example:
        >>> replace_surrogates("a \\ud83d dog") == "a \\ufffd dog"
        True
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
