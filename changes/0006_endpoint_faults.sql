-- Endpoints that answer only errors.
CREATE TABLE IF NOT EXISTS endpoint_faults (
  endpoint_id TEXT NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('call', 'run')),
  failures INTEGER NOT NULL,
  pauses INTEGER NOT NULL DEFAULT 0,
  paused_until TEXT,
  probing INTEGER NOT NULL DEFAULT 0,
  code TEXT NOT NULL,
  sentence TEXT NOT NULL,
  since TEXT NOT NULL,
  PRIMARY KEY (endpoint_id, kind)
) WITHOUT ROWID;
