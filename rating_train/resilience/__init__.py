"""Fault tolerance of a running job: run lock, watchdog, graceful stop, supervisor."""
