-- The whole database as it must be. `python -m tools.schema` brings any older one to this by the numbered files in changes/;
-- a test holds the two against each other. One line here is one column, and a new one comes last in its table.
-- No triggers: D1 splits a request's statements itself, and breaks on them.

CREATE TABLE IF NOT EXISTS jobs (
  -- The first eleven are those of the earlier version, whose rows and clients live on.
  id TEXT PRIMARY KEY,
  runpod_job_id TEXT,
  status TEXT NOT NULL DEFAULT 'queued',
  prompt TEXT NOT NULL DEFAULT '',
  model TEXT,
  result_r2_key TEXT,
  result_url TEXT,
  finished_at TEXT,
  error_message TEXT,
  created_at TEXT,
  updated_at TEXT,
  -- What the pipeline does next; NULL in final rows, and in live rows of the earlier version until the first claim.
  step TEXT CHECK (step IN ('submit', 'submitting', 'poll', 'store')),
  -- The caller's own input object for RunPod (JSON); NULL: the default one.
  input TEXT,
  -- Where this attempt was sent, which is where it must be asked for.
  endpoint_id TEXT,
  -- Counts writes; every save names the one it read.
  version INTEGER NOT NULL DEFAULT 0,
  -- GPU runs begun, the first is 1.
  attempt INTEGER NOT NULL DEFAULT 0,
  -- Calls of ours that failed in a row.
  failures INTEGER NOT NULL DEFAULT 0,
  -- Claims of the finished result since its last save; a result that kills whoever stores it is known by them.
  holds INTEGER NOT NULL DEFAULT 0,
  -- The attempt that a user's retry went on from; those after it are counted against MAX_ATTEMPTS.
  attempt_base INTEGER NOT NULL DEFAULT 0,
  -- Not before this instant; '' is due at once.
  due_at TEXT NOT NULL DEFAULT '',
  -- The nonce of the batch that saved last, and of the claim that holds the row.
  writer TEXT,
  claimer TEXT,
  -- The version at which the intent to submit was written; only while it is still the version may /run be called.
  intent_version INTEGER,
  runpod_status TEXT,
  -- The files of the result that are in R2 (JSON): key, url, content_type, bytes, sha256, width, height; or in the spool,
  -- and so marked.
  outputs TEXT,
  -- The links in the worker's answer (JSON), NULL in the place of a file that is in the answer itself; until it is stored.
  links TEXT,
  -- What is wrong with the other files (JSON); set once every file is in R2 or the spool, so that RunPod is not needed.
  warnings TEXT,
  error_code TEXT,
  -- Set when a finished result could not be stored.
  dead_at TEXT,
  cancel_at TEXT,
  submitted_at TEXT,
  -- When a worker was first seen at it.
  started_at TEXT,
  -- The earliest that the run can have ended.
  completed_at TEXT,
  -- Until when the finished result can be had from where it lies now.
  result_until TEXT,
  -- By when it must have been drawn.
  deadline_at TEXT,
  queue_ms INTEGER,
  execution_ms INTEGER,
  -- What a caller named one create, so that a repeat of it makes nothing; the place in it, and the hash of its body.
  idempotency_key TEXT,
  idempotency_n INTEGER,
  request_hash TEXT,
  -- The caller's own words about the job (JSON, text by text); job_metadata finds jobs by them.
  metadata TEXT,
  -- normal, or low: sent when RunPod's queue is short.
  priority TEXT NOT NULL DEFAULT 'normal',
  -- The seconds that the caller gave it to be drawn in; NULL: TOTAL_DEADLINE.
  deadline INTEGER,
  -- Since when it is being deleted; no verb but that may touch it any more.
  deleted_at TEXT,
  -- The pictures that its input is to have (JSON): the key of each, and its places in the input.
  pictures TEXT,
  -- Where its end is to be told.
  callback_url TEXT,
  -- US dollars for its ended attempts, as far as time and price are known, and for those of them without a result.
  cost REAL,
  wasted REAL,
  -- Attempts that may have cost something of which nobody knows how much.
  uncosted INTEGER NOT NULL DEFAULT 0,
  -- What the worker has last told of its run (JSON).
  progress TEXT
);

-- Claims look for due rows of one step.
CREATE INDEX IF NOT EXISTS jobs_due ON jobs (step, due_at) WHERE status IN ('queued', 'running');

-- What a user has cancelled and RunPod has not got.
CREATE INDEX IF NOT EXISTS jobs_cancelled ON jobs (step) WHERE cancel_at IS NOT NULL AND status IN ('queued', 'running');

-- The dead letters, newest first.
CREATE INDEX IF NOT EXISTS jobs_dead ON jobs (dead_at, id) WHERE dead_at IS NOT NULL;

-- A claim reads back what it got.
CREATE INDEX IF NOT EXISTS jobs_claimed ON jobs (claimer) WHERE status IN ('queued', 'running');

-- The list, newest first, of all and of one status.
CREATE INDEX IF NOT EXISTS jobs_created ON jobs (created_at, id);
CREATE INDEX IF NOT EXISTS jobs_status_created ON jobs (status, created_at, id);

-- The list of one model, and of some of its statuses.
CREATE INDEX IF NOT EXISTS jobs_model_status_created ON jobs (model, status, created_at, id);

-- A create happens once.
CREATE UNIQUE INDEX IF NOT EXISTS jobs_idempotency ON jobs (idempotency_key, idempotency_n) WHERE idempotency_key IS NOT NULL;

-- The list by metadata, newest first.
CREATE TABLE IF NOT EXISTS job_metadata (
  key TEXT NOT NULL,
  value TEXT NOT NULL,
  created_at TEXT NOT NULL,
  job_id TEXT NOT NULL,
  PRIMARY KEY (key, value, created_at, job_id)
) WITHOUT ROWID;

-- Pictures that callers may put into the bucket, or have put there.
CREATE TABLE IF NOT EXISTS uploads (
  key TEXT PRIMARY KEY,
  created_at TEXT NOT NULL,
  -- From when on it is removed, if no job uses it; NULL while one does.
  due_at TEXT,
  -- Since when it is being removed; no job may use it any more.
  swept_at TEXT
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS uploads_due ON uploads (due_at) WHERE due_at IS NOT NULL;

-- Which job uses which of them.
CREATE TABLE IF NOT EXISTS job_uploads (
  key TEXT NOT NULL,
  job_id TEXT NOT NULL,
  PRIMARY KEY (key, job_id)
) WITHOUT ROWID;

-- What is to be told at a callback_url, and what came of it: the outbox, written in one batch with the job's end.
CREATE TABLE IF NOT EXISTS deliveries (
  job_id TEXT NOT NULL,
  -- Of the job's row at its end, which is told once.
  version INTEGER NOT NULL,
  type TEXT NOT NULL,
  url TEXT NOT NULL,
  -- The job as it was then (JSON).
  data TEXT NOT NULL,
  created_at TEXT NOT NULL,
  -- When it is tried next; NULL: no more.
  due_at TEXT,
  status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'delivered', 'failed')),
  tries INTEGER NOT NULL DEFAULT 0,
  claimer TEXT,
  -- The last tries (JSON): at, status, ms, error.
  log TEXT NOT NULL DEFAULT '[]',
  PRIMARY KEY (job_id, version)
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (due_at) WHERE due_at IS NOT NULL;

-- The timeline: what happened to a job, in the order of the row's versions.
CREATE TABLE IF NOT EXISTS job_events (
  job_id TEXT NOT NULL,
  version INTEGER NOT NULL,
  n INTEGER NOT NULL,
  at TEXT NOT NULL,
  event TEXT NOT NULL,
  detail TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(detail)),
  PRIMARY KEY (job_id, version, n)
) WITHOUT ROWID;

-- Endpoints that answer only errors: how many in a row of each kind. What works there removes the row.
CREATE TABLE IF NOT EXISTS endpoint_faults (
  endpoint_id TEXT NOT NULL,
  -- Of a call, by which no run was taken; of a run, which a worker has failed.
  kind TEXT NOT NULL CHECK (kind IN ('call', 'run')),
  failures INTEGER NOT NULL,
  pauses INTEGER NOT NULL DEFAULT 0,
  -- Until when nothing is sent there; after that one job at a time tries it. NULL: too few have failed.
  paused_until TEXT,
  -- Whether a job has been sent to try it, of which nothing was heard yet.
  probing INTEGER NOT NULL DEFAULT 0,
  -- The last of the errors.
  code TEXT NOT NULL,
  sentence TEXT NOT NULL,
  since TEXT NOT NULL,
  PRIMARY KEY (endpoint_id, kind)
) WITHOUT ROWID;

-- Which of the files in changes/ this database has had.
CREATE TABLE IF NOT EXISTS schema_changes (
  number INTEGER PRIMARY KEY,
  name TEXT NOT NULL,
  applied_at TEXT NOT NULL
);
