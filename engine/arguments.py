"""Types of command-line arguments that several programs have."""
import argparse


def positive(text: str) -> int:
    """Return a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def positives(text: str) -> list[int]:
    """Return whole numbers from 1 on, separated by commas."""
    return [positive(part) for part in text.split(",")]
