"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """Bad input, told in one line per problem: what is wrong, what is allowed, what to do.

    Scripts print it without a traceback and exit with code 2. Anything else raised is a defect.
    """
