"""What never ships: the local cloud, the server that starts everything, and the commands of the operator."""


class Problem(Exception):
    """Raised when a command cannot go on, with the sentence to show."""
