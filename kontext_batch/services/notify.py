"""Events leave the system: each is sent to the webhooks that want it, at least once, by whichever beat comes first.

A beat that dies between the send and its record leaves the event to the next one, which sends it again under the same
id. What cannot be sent waits longer and longer and is given up in the end; it stays to be seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from kontext_batch.errors import InfrastructureError, ObjectNotFound
from kontext_batch.hashing import canonical_json
from kontext_batch.observability import metrics
from kontext_batch.planning.events import ClaimedSend, Webhook, retry_delay
from kontext_batch.ports import Post, Repository

log = structlog.get_logger(__name__)

CLAIM_SECONDS = 120.0
"""How long one tick may hold its sends before another process tries; longer than `TICK_SECONDS` and one call."""
TICK_SECONDS = 30.0
"""What one tick spends on sending: the beat has other things to do."""
AT_ONCE = 50


@dataclass(frozen=True, slots=True)
class Notifier:
    """Sends what is due."""

    repository: Repository
    post: Post
    webhooks: Sequence[Webhook]
    clock: Callable[[], float] = time.monotonic

    def tick(self) -> int:
        """Returns how many events were delivered. Without webhooks too: what is made now is for nobody later."""
        self.repository.address_events(self.webhooks)
        names = [webhook.name for webhook in self.webhooks]
        if not names:
            return 0
        until = self.clock() + TICK_SECONDS
        delivered = 0
        silent: dict[str, float] = {}
        """Webhook that failed in this tick -> seconds until its next try; its others would meet the same."""
        for send in self.repository.claim_sends(names, limit=AT_ONCE, seconds=CLAIM_SECONDS):
            if send.webhook in silent or self.clock() > until:
                wait = silent.get(send.webhook, 0.0)
                why = "an event before it could not be sent" if send.webhook in silent else "there was no time for it"
                self.repository.settle_send(send.id, send.token, error=why, retry_in=wait, untried=True)
                continue
            try:
                self.post.post(send.webhook, send.event_id, body_of(send))
            except (InfrastructureError, ObjectNotFound) as error:
                silent[send.webhook] = self._failed(send, error)
                continue
            if self.repository.settle_send(send.id, send.token):
                metrics.WEBHOOKS.labels(send.webhook, "delivered").inc()
                delivered += 1
        return delivered

    def _failed(self, send: ClaimedSend, error: Exception) -> float:
        """Record it; returns the seconds that the webhook is left alone."""
        retry_in = retry_delay(send.tries) if isinstance(error, InfrastructureError) else None
        self.repository.settle_send(send.id, send.token, error=str(error), retry_in=retry_in)
        about = {"webhook": send.webhook, "event_id": send.event_id, "tries": send.tries, "error": str(error)}
        if retry_in is None:
            metrics.WEBHOOKS.labels(send.webhook, "given_up").inc()
            log.error("event given up", **about)
            return 0.0 if isinstance(error, ObjectNotFound) else retry_delay(1) or 0.0
        metrics.WEBHOOKS.labels(send.webhook, "failed").inc()
        log.warning("event not sent; tried again later", **about, retry_in=round(retry_in, 1))
        return retry_in


def body_of(send: ClaimedSend) -> bytes:
    """The same bytes at each try."""
    return canonical_json({"type": send.event, "timestamp": send.created.isoformat(), "data": send.data}).encode()
