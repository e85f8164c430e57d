"""What the user got wrong, in one line: which file, row or key, and what to do."""


class InputError(ValueError):
  """Bad input of the user's; a command prints its message as one line and exits with code 2."""
