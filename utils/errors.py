"""The exceptions that a user gets to read, and a help to word them."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one line per problem: what is wrong, what is allowed, what to do.

    Scripts print it without a traceback and exit with code 2. Anything else raised is a defect.
    """


class NothingToDo(Exception):
    """What was asked for has been done before. Scripts say so and exit with 0."""


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks, cut to 300 characters; its type if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, cut to 200 characters; its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def suggestion(name: str, choices: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest of choices, or ''."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
