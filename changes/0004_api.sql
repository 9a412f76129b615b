-- What callers say of their jobs beside the prompt, the keys under which creating may be repeated; what finds them.

ALTER TABLE jobs ADD COLUMN idempotency_key TEXT;
ALTER TABLE jobs ADD COLUMN idempotency_n INTEGER;
ALTER TABLE jobs ADD COLUMN request_hash TEXT;
ALTER TABLE jobs ADD COLUMN metadata TEXT;
ALTER TABLE jobs ADD COLUMN priority TEXT NOT NULL DEFAULT 'normal';
ALTER TABLE jobs ADD COLUMN deadline INTEGER;
ALTER TABLE jobs ADD COLUMN deleted_at TEXT;

CREATE UNIQUE INDEX IF NOT EXISTS jobs_idempotency ON jobs (idempotency_key, idempotency_n) WHERE idempotency_key IS NOT NULL;

CREATE TABLE IF NOT EXISTS job_metadata (
  key TEXT NOT NULL,
  value TEXT NOT NULL,
  created_at TEXT NOT NULL,
  job_id TEXT NOT NULL,
  PRIMARY KEY (key, value, created_at, job_id)
) WITHOUT ROWID;
