"""Celery workers: tasks of a few lines, the process that runs them, and how it starts and ends."""
