"""Is merely wrong."""


def add(x: int, y: int) -> int:
    """Subtracts."""
    return x - y
