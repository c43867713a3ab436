"""Stand-alone programs that run inside the sandbox (`sandbox.py` starts them by path; they import only the standard
library and each other), and the pieces they share."""
