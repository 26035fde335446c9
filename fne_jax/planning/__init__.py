"""What a run would take of a machine that is not there: its program, compiled and counted."""
