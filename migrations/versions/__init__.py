"""One module a revision; `REVISION` in `kontext_batch.lineage.tables` names the newest."""
