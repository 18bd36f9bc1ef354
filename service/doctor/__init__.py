"""The doctor: checks of the set-up, each with what it found and how to mend it."""
