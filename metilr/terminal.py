"""Text from strangers on its way to a terminal."""


def printable(text: str) -> str:
    """Text without what steers a terminal or is no text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
