-- Pictures that go into an input, callbacks with their outbox, what attempts have cost, and progress.
ALTER TABLE jobs ADD COLUMN pictures TEXT;
ALTER TABLE jobs ADD COLUMN callback_url TEXT;
ALTER TABLE jobs ADD COLUMN cost REAL;
ALTER TABLE jobs ADD COLUMN wasted REAL;
ALTER TABLE jobs ADD COLUMN uncosted INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN progress TEXT;

CREATE TABLE IF NOT EXISTS uploads (
  key TEXT PRIMARY KEY,
  created_at TEXT NOT NULL,
  due_at TEXT,
  swept_at TEXT
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS uploads_due ON uploads (due_at) WHERE due_at IS NOT NULL;

CREATE TABLE IF NOT EXISTS job_uploads (
  key TEXT NOT NULL,
  job_id TEXT NOT NULL,
  PRIMARY KEY (key, job_id)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS deliveries (
  job_id TEXT NOT NULL,
  version INTEGER NOT NULL,
  type TEXT NOT NULL,
  url TEXT NOT NULL,
  data TEXT NOT NULL,
  created_at TEXT NOT NULL,
  due_at TEXT,
  status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'delivered', 'failed')),
  tries INTEGER NOT NULL DEFAULT 0,
  claimer TEXT,
  log TEXT NOT NULL DEFAULT '[]',
  PRIMARY KEY (job_id, version)
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (due_at) WHERE due_at IS NOT NULL;
