"""Celery as transport: what it may carry, over which queues, and how the workers are rung."""
