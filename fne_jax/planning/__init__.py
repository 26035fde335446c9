"""What a run would take of a machine that you do not have: its program, compiled and counted."""
