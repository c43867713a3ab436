"""Lightning callbacks: what is logged and written."""
