"""The exceptions whose text a user reads, and functions that make such texts."""

import difflib
import errno
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Bad input, one line per problem: what is wrong, what is allowed, what to do.

    Scripts print it without a traceback and exit with code 2. Anything else raised is a defect.

    Args:
        problems: one text for each. If a text quotes a file or a flag, the quotation is made
            harmless when it is printed, see `shown`.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class Diverged(UserError):
    """Numbers became NaN or infinite. From a checkpoint the run would do the same again."""


class PutBack(UserError):
    """A run that was to replace a finished one has ended early, and the earlier one is back."""


class NothingToDo(Exception):
    """The work was already done before. Scripts say so and exit with 0."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether the system, or a GPU, has no room for what was asked for."""
    told = (
        r"can't allocate memory|not enough memory|Cannot allocate memory|Storage size calculation|"
        r"out of memory|_ALLOC_FAILED|bad_alloc|Invalid buffer size|"
        r"could not create a (primitive|memory object)$"  # of oneDNN, which does not say why
    )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and re.search(told, one_line(error)) is not None


def is_lost_process(error: BaseException) -> bool:
    """Whether another process of this run has ended, so that the processes cannot go on."""
    # Of gloo, torch's store, and NCCL.
    told = r"gloo/transport|Connection was likely closed|ncclRemoteError|remote process exit"
    return isinstance(error, RuntimeError) and re.search(told, one_line(error)) is not None


def told(
    who: str,
    work: Callable[[], T],
    what: str,
    advice: str = "repair it",
    of: type[BaseException] = BaseException,
) -> T:
    """The result of work with a user's network, whose code may raise anything.

    Args:
        who: the network, as the message names it.
        what: what it cannot do if `work` raises something.
        of: what is reported; others pass.

    Raises:
        UserError: if it does.
    """
    try:
        return work()
    except (UserError, KeyboardInterrupt):
        raise
    except of as error:
        if is_lack_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{who} cannot {what} ({reason}); {advice}") from error


def shown(text: object, limit: int = 2000) -> str:
    """A text as one line that can be printed: the only way in which foreign text is shown.

    Line breaks, control and escape codes, marks that turn the direction of text, and halves of
    characters become escapes such as `\\n` and `\\x1b`; if a text is too long, its middle is
    skipped.

    Args:
        text: anything; its `str` is shown.
        limit: characters, >= 20.
    """
    whole = str(text)
    if len(whole) > limit:
        half = (limit - 3) // 2
        whole = f"{whole[:half]}...{whole[-half:]}"
    if whole.isprintable():
        return whole
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in whole
    )


def quoted(value: object) -> str:
    """A value of a file or a flag, as a message quotes it: one short line, also if it is large."""
    try:
        return shown(value if isinstance(value, str) else repr(value), 100)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in itself
        return f"a very large {type(value).__name__}"


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks, cut to 300 characters; its type if it has none."""
    try:
        text = str(error)
    except Exception:  # of a class that is not ours, and whose text fails in turn
        text = ""
    return shown(" ".join(text.split())[:300]) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, cut to 200 characters; its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def reason_of(error: BaseException, text: Callable[[BaseException], str] = one_line) -> str:
    """Why a file cannot be read: the system's reason if it gave one, else the exception's text.

    Args:
        text: `one_line` or `first_line`.
    """
    return getattr(error, "strerror", None) or text(error)


def listed(names: Sequence[object], between: str = ", ", limit: int = 60) -> str:
    """At most ten names, and how many more there are.

    Args:
        limit: characters of each, see `shown`.
    """
    parts = [shown(name, limit) for name in names[:10]]
    if len(names) > 10:
        parts.append(f"and {len(names) - 10} more")
    return between.join(parts)


def counted(count: int, thing: str) -> str:
    """How many there are: '1 run', '2 runs'."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def nearest(name: str, choices: Iterable[str]) -> list[str]:
    """The choices, those first that are most like the name."""
    match = difflib.SequenceMatcher(b=name[:100].lower())

    def likeness(choice: str) -> float:
        match.set_seq1(choice.lower())
        return match.ratio()

    return sorted(choices, key=likeness, reverse=True)


def suggestion(name: str, choices: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest of choices, or ''."""
    lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name[:100].lower(), filter(None, lower), n=1, cutoff=0.6)
    return f" (did you mean {lower[close[0]]}?)" if close else ""
