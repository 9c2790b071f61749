"""What this host is and can do: kernel, ids, the root's plan, failures with their cure."""
