"""Tells an operator what is wrong with the settings, all at once."""

from collections.abc import Collection
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import ErrorDetails

HEADING = "These settings under args: cannot work (config/settings.py explains each):"


def describe_mistakes(
    error: ValidationError, *, known: Collection[str], elsewhere: dict[str, str]
) -> str:
    """One line per wrong setting: its name, what it may be, what it was.

    ``known``: names of the settings that exist. ``elsewhere``: where to set what is not one.
    """
    mistakes: dict[str, list[ErrorDetails]] = {}
    for mistake in error.errors(include_url=False):
        name = str(mistake["loc"][0]) if mistake["loc"] else ""
        mistakes.setdefault(name, []).append(mistake)
    lines = [HEADING]
    for name, complaints in mistakes.items():
        if complaints[0]["type"] == "extra_forbidden":
            hint = elsewhere.get(name) or _suggestion(name, known)
            lines.append(f"{name}: there is no such setting{hint and '; '}{hint}")
        else:
            lines.append(_describe(name, complaints))
    return "\n  ".join(lines)


def _describe(name: str, complaints: list[ErrorDetails]) -> str:
    # A setting that may be one of several types has one complaint from each.
    wanted = " or ".join(_wanted(complaint) for complaint in complaints)
    return f"{name}: {wanted}, got {complaints[0]['input']!r}" if name else wanted


def _suggestion(name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else ""


def _wanted(complaint: ErrorDetails) -> str:
    return complaint["msg"].removeprefix("Value error, ").removeprefix("Input ")
