-- The list of one model, and of some of its statuses. Alone, for the table may be large.

CREATE INDEX IF NOT EXISTS jobs_model_status_created ON jobs (model, status, created_at, id);
