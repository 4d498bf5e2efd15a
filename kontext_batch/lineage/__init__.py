"""Runs, steps and what came of them, in SQLite or PostgreSQL: the adapter behind `ports.Repository`.

tables      the schema                          claim       claim, heartbeat, release, reconcile
engine      connections, transactions           commit      results, fenced by their tokens
migrate     the schema's revision               runs        retry, cancel, finish, summaries
submit      a plan becomes a run                deliveries  what is to be brought where
reasking    which steps must run (again)        queries     questions; garbage: what may be removed
verify      the invariants, checked             repository  all of it as one `Repository`
holds       what may not be removed             takedown    a photo is forgotten
archived    a run leaves for an archive         archives    and comes from one
"""
