"""Fills the grader's memory or its disk, if output is collected without a bound."""

while True:
    print("spam" * 1000)
