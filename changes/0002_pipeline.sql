-- What the pipeline remembers of a job beside the earlier version's columns, its timeline, and the indexes of the queries.

ALTER TABLE jobs ADD COLUMN step TEXT CHECK (step IN ('submit', 'submitting', 'poll', 'store'));
ALTER TABLE jobs ADD COLUMN input TEXT;
ALTER TABLE jobs ADD COLUMN endpoint_id TEXT;
ALTER TABLE jobs ADD COLUMN version INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN attempt INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN failures INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN holds INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN attempt_base INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN due_at TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN writer TEXT;
ALTER TABLE jobs ADD COLUMN claimer TEXT;
ALTER TABLE jobs ADD COLUMN intent_version INTEGER;
ALTER TABLE jobs ADD COLUMN runpod_status TEXT;
ALTER TABLE jobs ADD COLUMN outputs TEXT;
ALTER TABLE jobs ADD COLUMN links TEXT;
ALTER TABLE jobs ADD COLUMN warnings TEXT;
ALTER TABLE jobs ADD COLUMN error_code TEXT;
ALTER TABLE jobs ADD COLUMN dead_at TEXT;
ALTER TABLE jobs ADD COLUMN cancel_at TEXT;
ALTER TABLE jobs ADD COLUMN submitted_at TEXT;
ALTER TABLE jobs ADD COLUMN started_at TEXT;
ALTER TABLE jobs ADD COLUMN completed_at TEXT;
ALTER TABLE jobs ADD COLUMN result_until TEXT;
ALTER TABLE jobs ADD COLUMN deadline_at TEXT;
ALTER TABLE jobs ADD COLUMN queue_ms INTEGER;
ALTER TABLE jobs ADD COLUMN execution_ms INTEGER;

CREATE INDEX IF NOT EXISTS jobs_due ON jobs (step, due_at) WHERE status IN ('queued', 'running');

CREATE INDEX IF NOT EXISTS jobs_cancelled ON jobs (step) WHERE cancel_at IS NOT NULL AND status IN ('queued', 'running');

CREATE INDEX IF NOT EXISTS jobs_dead ON jobs (dead_at, id) WHERE dead_at IS NOT NULL;

CREATE INDEX IF NOT EXISTS jobs_claimed ON jobs (claimer) WHERE status IN ('queued', 'running');

CREATE INDEX IF NOT EXISTS jobs_created ON jobs (created_at, id);

CREATE INDEX IF NOT EXISTS jobs_status_created ON jobs (status, created_at, id);

CREATE TABLE IF NOT EXISTS job_events (
  job_id TEXT NOT NULL,
  version INTEGER NOT NULL,
  n INTEGER NOT NULL,
  at TEXT NOT NULL,
  event TEXT NOT NULL,
  detail TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(detail)),
  PRIMARY KEY (job_id, version, n)
) WITHOUT ROWID;
