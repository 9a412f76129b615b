-- What may happen to the table. Each statement: its name, a sentence, its arrow in jobs.TRANSITIONS if it has one. What
-- several statements have in common is a part, and stands in them by its name in braces.
-- :name is bound by name; store.py turns it into D1's ?1. JSON numbers that are bound arrive as REAL, so counts are CAST
-- and rows come as one JSON text through json_each, which keeps integers.
-- A line of a timeline that is written here comes back, to be logged.
-- Every batch made of these may be sent again with the same parameters: its nonce makes a repeat do nothing new.


-- part: at_runpod
-- How many runs RunPod has, or may have, as far as it is worth counting. :max_running is NULL where it bounds nothing, so that nobody
-- counts.
(SELECT count(*) FROM (
  SELECT 1
  FROM jobs AS there INDEXED BY jobs_due
  WHERE there.status IN ('queued', 'running') AND there.step IN ('submitting', 'poll')
  LIMIT CAST(:max_running AS INTEGER)
))


-- part: before
-- How many runs RunPod has, and will have before a new job.
(SELECT count(*) FROM (
  SELECT 1
  FROM jobs AS there INDEXED BY jobs_due
  WHERE there.status IN ('queued', 'running') AND there.step IN ('submit', 'submitting', 'poll')
  LIMIT CAST(:max_running AS INTEGER)
))


-- part: endpoint
-- Where a job is sent.
coalesce((SELECT own.value FROM json_each(:endpoints) AS own WHERE own.key = coalesce(jobs.model, 'qwen-image')), :endpoint_id)


-- part: is_paused
-- Whether nothing but a probe is sent there; mostly no endpoint is, and no job's need be found.
EXISTS (SELECT 1 FROM endpoint_faults WHERE paused_until IS NOT NULL)
  AND EXISTS (SELECT 1 FROM endpoint_faults AS fault WHERE fault.endpoint_id = {endpoint} AND fault.paused_until IS NOT NULL)


-- part: intent
-- claim: submit -> submitting. The intent is on disk before any paid call.
step = 'submitting', version = version + 1, intent_version = version + 1, attempt = attempt + 1,
runpod_job_id = NULL, runpod_status = NULL, claimer = :nonce, due_at = :unknown_at, updated_at = :now,
endpoint_id = {endpoint},
deadline_at = coalesce(deadline_at, :deadline_at)


-- name: create_jobs
-- Insert all of the rows or none: they are not there yet, their idempotency key neither, their pictures are, and there is
-- room for them in the queue. Those that are to be sent at once are claimed by this, as far as RunPod may be given more runs and
-- their endpoint is not paused. Of two requests at once with one key the second finds the first one's rows, for D1 writes one after the other.
INSERT INTO jobs (
  id, status, step, prompt, model, input, endpoint_id, version, attempt, intent_version, due_at, deadline_at, claimer, created_at, updated_at,
  idempotency_key, idempotency_n, request_hash, metadata, priority, deadline, pictures, callback_url
)
SELECT
  json_extract(value, '$.id'), 'queued', iif(sends, 'submitting', 'submit'), json_extract(value, '$.prompt'), json_extract(value, '$.model'),
  json_extract(value, '$.input'), json_extract(value, '$.endpoint_id'), json_extract(value, '$.version'), iif(sends, 1, 0),
  iif(sends, json_extract(value, '$.version'), NULL), iif(sends, json_extract(value, '$.due_at'), json_extract(value, '$.created_at')), json_extract(value, '$.deadline_at'), :nonce,
  json_extract(value, '$.created_at'), json_extract(value, '$.updated_at'),
  json_extract(value, '$.idempotency_key'), json_extract(value, '$.idempotency_n'), json_extract(value, '$.request_hash'),
  json_extract(value, '$.metadata'), json_extract(value, '$.priority'), json_extract(value, '$.deadline'),
  json_extract(value, '$.pictures'), json_extract(value, '$.callback_url')
FROM (
  SELECT
    value,
    json_extract(value, '$.step') = 'submitting'
      AND CASE WHEN :max_running IS NULL THEN true ELSE key + {before} < CAST(:max_running AS INTEGER) END
      AND NOT EXISTS (
        SELECT 1
        FROM endpoint_faults AS fault
        WHERE fault.endpoint_id = json_extract(value, '$.endpoint_id') AND fault.paused_until IS NOT NULL
      ) AS sends
  FROM json_each(:rows)
  LIMIT -1 -- keeps SQLite from working that out once for each of its uses
)
WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE idempotency_key = :idempotency_key)
  AND NOT EXISTS (
    SELECT 1
    FROM json_each(:uploads) AS wanted
    WHERE NOT EXISTS (SELECT 1 FROM uploads WHERE uploads.key = wanted.value AND uploads.swept_at IS NULL)
  )
  AND json_array_length(:rows) + (
    SELECT count(*)
    FROM (
      SELECT 1
      FROM jobs INDEXED BY jobs_due
      WHERE step IN ('submit', 'submitting', 'poll', 'store') AND status IN ('queued', 'running')
      LIMIT CAST(:max_queued AS INTEGER)
    )
  ) <= CAST(:max_queued AS INTEGER)
ON CONFLICT DO NOTHING


-- name: log_created
-- The first line of each new job's timeline, written only by the request that made the job.
INSERT INTO job_events (job_id, version, n, at, event, detail)
SELECT id, version, 0, created_at, 'created', json_object('attempt', attempt, 'by', :by)
FROM jobs
WHERE id IN (SELECT value FROM json_each(:ids)) AND claimer = :nonce
ON CONFLICT DO NOTHING
RETURNING job_id, event, CAST(json_extract(detail, '$.attempt') AS INTEGER) AS attempt


-- name: file_metadata
-- What finds the new jobs by their metadata.
INSERT INTO job_metadata (key, value, created_at, job_id)
SELECT word.key, word.value, jobs.created_at, jobs.id
FROM jobs, json_each(jobs.metadata) AS word
WHERE jobs.id IN (SELECT value FROM json_each(:ids)) AND jobs.claimer = :nonce
ON CONFLICT DO NOTHING


-- name: use_uploads
-- Which of the new jobs uses which picture.
INSERT INTO job_uploads (key, job_id)
SELECT DISTINCT json_extract(picture.value, '$.key'), jobs.id
FROM jobs, json_each(jobs.pictures) AS picture
WHERE jobs.id IN (SELECT value FROM json_each(:ids)) AND jobs.claimer = :nonce
ON CONFLICT DO NOTHING


-- name: keep_uploads
-- Those pictures stay for as long as a job uses them.
UPDATE uploads
SET due_at = NULL
WHERE key IN (SELECT value FROM json_each(:uploads))
  AND EXISTS (SELECT 1 FROM job_uploads WHERE job_uploads.key = uploads.key)


-- name: select_uploads
-- Which of these pictures may be used.
SELECT key FROM uploads WHERE key IN (SELECT value FROM json_each(:uploads)) AND swept_at IS NULL


-- name: select_created
-- The rows of this create, or those that an earlier one has made under the same key, in their order; the first with their step.
SELECT id, idempotency_n, request_hash, iif(claimer = :nonce, step, NULL) AS step
FROM jobs
WHERE id IN (SELECT value FROM json_each(:ids)) OR idempotency_key = :idempotency_key
ORDER BY idempotency_n


-- name: adopt_old_rows_event
-- The timeline of live rows of the earlier version begins where we find them.
INSERT INTO job_events (job_id, version, n, at, event, detail)
SELECT id, version + 1, 0, :now, 'adopted', json_object('status', status, 'runpod_job_id', CAST(runpod_job_id AS TEXT))
FROM jobs
WHERE step IS NULL AND status IN ('queued', 'running') AND typeof(id) = 'text'
ON CONFLICT DO NOTHING
RETURNING job_id, event, CAST(json_extract(detail, '$.attempt') AS INTEGER) AS attempt


-- name: adopt_old_rows
-- Give live rows of the earlier version the step they stand at: sent ones are polled, unsent ones submitted, and a
-- running one without an id is a submit whose answer was lost. What was sent counts as the first attempt, on the endpoint
-- of then. (SQLite lets a TEXT PRIMARY KEY be NULL; such a row is nobody's.)
UPDATE jobs
SET
  step = CASE
    WHEN coalesce(runpod_job_id, '') <> '' THEN 'poll'
    WHEN status = 'queued' THEN 'submit'
    ELSE 'submitting'
  END,
  status = CASE WHEN coalesce(runpod_job_id, '') <> '' THEN 'running' ELSE 'queued' END,
  attempt = CASE WHEN status = 'running' OR coalesce(runpod_job_id, '') <> '' THEN max(attempt, 1) ELSE attempt END,
  endpoint_id = coalesce(endpoint_id, :endpoint_id),
  deadline_at = coalesce(deadline_at, :deadline_at),
  version = version + 1
WHERE step IS NULL AND status IN ('queued', 'running') AND typeof(id) = 'text'


-- name: expire_submits_event
-- Say in the timeline that the next attempt may be the second one paid for.
INSERT INTO job_events (job_id, version, n, at, event, detail)
SELECT id, version + 1, 0, :now, 'possible_duplicate', json_object('attempt', attempt)
FROM jobs
WHERE status IN ('queued', 'running') AND step = 'submitting' AND due_at <= :now
ON CONFLICT DO NOTHING
RETURNING job_id, event, CAST(json_extract(detail, '$.attempt') AS INTEGER) AS attempt


-- name: expire_submits
-- expire: submitting -> submit. RunPod's answer never came; the attempt stays counted, and may have been paid.
UPDATE jobs
SET step = 'submit', status = 'queued', version = version + 1, due_at = :now, updated_at = :now, uncosted = uncosted + 1
WHERE status IN ('queued', 'running') AND step = 'submitting' AND due_at <= :now


-- name: cancel_waiting_event
-- Say in the timeline that a cancelled job has come back unsent.
INSERT INTO job_events (job_id, version, n, at, event, detail)
SELECT id, version + 1, 0, :now, 'cancelled', json_object('attempt', attempt)
FROM jobs
WHERE status IN ('queued', 'running') AND cancel_at IS NOT NULL AND step = 'submit'
ON CONFLICT DO NOTHING
RETURNING job_id, event, CAST(json_extract(detail, '$.attempt') AS INTEGER) AS attempt


-- part: told
-- The job as a callback tells of it; in two parts, for D1 takes 32 arguments to a function.
json_set(
  json_object(
    'id', id, 'status', status, 'prompt', substr(prompt, 1, 1000), 'model', model, 'result_r2_key', result_r2_key,
    'result_url', result_url, 'outputs', json(coalesce(outputs, '[]')), 'error', error_message, 'error_code', error_code,
    'attempt', attempt, 'queue_ms', queue_ms, 'execution_ms', execution_ms
  ),
  '$.cost', cost, '$.wasted', wasted, '$.uncosted', uncosted, '$.created_at', created_at, '$.submitted_at', submitted_at,
  '$.completed_at', completed_at, '$.finished_at', finished_at, '$.dead_at', dead_at, '$.metadata', json(coalesce(metadata, '{}'))
)


-- name: tell_of_waiting
-- The outbox for those, as they will be a statement later.
INSERT INTO deliveries (job_id, version, type, url, data, created_at, due_at)
SELECT
  id, version + 1, 'job.cancelled', callback_url,
  json_set({told}, '$.status', 'cancelled', '$.finished_at', :now), :now, :now
FROM jobs
WHERE status IN ('queued', 'running') AND cancel_at IS NOT NULL AND step = 'submit' AND callback_url IS NOT NULL
ON CONFLICT DO NOTHING


-- name: cancel_waiting
-- cancel: submit -> cancelled. The user cancelled it while it was being sent, or was to be sent again.
UPDATE jobs
SET status = 'cancelled', step = NULL, version = version + 1, claimer = NULL, finished_at = :now, updated_at = :now
WHERE status IN ('queued', 'running') AND cancel_at IS NOT NULL AND step = 'submit'


-- name: forget_old_faults
-- Nobody has wanted to send a job there since its pause was over, so the next one may simply be sent.
DELETE FROM endpoint_faults WHERE paused_until < :forgotten_at


-- name: claim_probes
-- Who tries an endpoint whose pause is over: one job; but where runs have failed, which may be the fault of what one caller wants,
-- twice as many after each pause. Those that have been sent least often go first, so that it is never the same.
UPDATE jobs
SET {intent}
WHERE id IN (
  SELECT id
  FROM (
    SELECT
      id, nth,
      sum((SELECT length(one.prompt) + coalesce(length(one.input), 0) FROM jobs AS one WHERE one.id = ranked.id)) OVER (ORDER BY nth, id) AS bytes
    FROM (
      SELECT
        jobs.id, over.most,
        row_number() OVER (
          PARTITION BY over.endpoint_id ORDER BY jobs.failures + jobs.attempt - jobs.attempt_base, jobs.id
        ) AS nth
      FROM (
        SELECT endpoint_id, min(iif(kind = 'run', 1 << min(pauses, 5), 1)) AS most
        FROM endpoint_faults
        WHERE paused_until IS NOT NULL
        GROUP BY endpoint_id
        HAVING max(paused_until) <= :now
      ) AS over
      CROSS JOIN jobs
      WHERE jobs.status IN ('queued', 'running') AND jobs.step = 'submit' AND jobs.due_at <= :now
        AND coalesce(jobs.deadline_at > :now, true) AND {endpoint} = over.endpoint_id
    ) AS ranked
    WHERE nth <= most
  )
  WHERE nth = 1 OR bytes <= CAST(:bytes AS INTEGER)
  ORDER BY nth
  LIMIT CASE WHEN :max_running IS NULL THEN -1 ELSE max(0, CAST(:max_running AS INTEGER) - {at_runpod}) END
)


-- name: mark_probes
-- What comes of it is waited for, but not for ever.
UPDATE endpoint_faults
SET probing = 1, paused_until = :probe_until
WHERE EXISTS (SELECT 1 FROM endpoint_faults WHERE paused_until IS NOT NULL) AND paused_until IS NOT NULL AND endpoint_id IN (
  SELECT endpoint_id
  FROM jobs
  WHERE claimer = :nonce AND status IN ('queued', 'running') AND step = 'submitting' AND intent_version = version
    AND coalesce(deadline_at > :now, true)
)


-- name: claim_submits
-- At most :limit rows and :bytes of input, and so many that RunPod has no more runs than it may have; none for an endpoint that is
-- paused. What is too late to be sent is claimed in any case, for whoever would send it ends it. A young
-- job of low priority that has time is taken after the others, and only while fewer than :low_ahead runs would wait for a worker.
UPDATE jobs
SET {intent}
WHERE id IN (
  SELECT id
  FROM (
    SELECT
      id, late,
      row_number() OVER oldest AS nth, sum(NOT late) OVER oldest AS runs,
      sum(iif(late, 0, length(prompt) + coalesce(length(input), 0))) OVER oldest AS bytes
    FROM (
      SELECT id, due_at, '' AS prompt, NULL AS input, true AS late, false AS low
      FROM (
        SELECT id, due_at
        FROM jobs
        -- Among the oldest they are found below, where nothing keeps these from being claimed.
        WHERE status IN ('queued', 'running') AND step = 'submit' AND deadline_at < :now
        LIMIT iif(:max_running IS NOT NULL OR EXISTS (SELECT 1 FROM endpoint_faults WHERE paused_until IS NOT NULL), CAST(:limit AS INTEGER), 0)
      )
      UNION ALL
      SELECT id, due_at, prompt, input, late, false AS low
      FROM (
        SELECT id, due_at, prompt, input, coalesce(deadline_at < :now, false) AS late
        FROM jobs
        WHERE status IN ('queued', 'running') AND step = 'submit' AND due_at <= :now AND (priority <> 'low' OR created_at <= :low_since OR deadline <= CAST(:low_deadline AS INTEGER))
          AND NOT ({is_paused})
        ORDER BY due_at
        LIMIT CAST(:limit AS INTEGER)
      )
      UNION ALL
      SELECT id, due_at, prompt, input, false AS late, true AS low
      FROM (
        SELECT id, due_at, prompt, input
        FROM jobs
        WHERE status IN ('queued', 'running') AND step = 'submit' AND due_at <= :now AND priority = 'low' AND created_at > :low_since
          AND coalesce(deadline > CAST(:low_deadline AS INTEGER), true) AND NOT ({is_paused})
        ORDER BY due_at
        LIMIT min(CAST(:limit AS INTEGER), max(0, CAST(:low_ahead AS INTEGER) - (
          SELECT count(*)
          FROM (
            SELECT 1
            FROM jobs INDEXED BY jobs_due
            WHERE status IN ('queued', 'running') AND step IN ('submit', 'poll') AND (
              (step = 'submit' AND (priority <> 'low' OR created_at <= :low_since OR deadline <= CAST(:low_deadline AS INTEGER)))
              OR (step = 'poll' AND runpod_status = 'IN_QUEUE')
            )
            LIMIT CAST(:low_ahead AS INTEGER)
          )
        )))
      )
    )
    WINDOW oldest AS (ORDER BY late DESC, low, due_at, id)
  )
  WHERE (nth = 1 OR bytes <= CAST(:bytes AS INTEGER)) AND CASE WHEN late OR :max_running IS NULL THEN true ELSE runs + {at_runpod} <= CAST(:max_running AS INTEGER) END
)


-- name: claim_one_submit
-- One job by its id, or the oldest one where :id is NULL, whether it is due or not, and whether its endpoint is paused.
UPDATE jobs
SET {intent}
WHERE id = coalesce(:id, (
    SELECT id FROM jobs WHERE status = 'queued' AND step = 'submit' AND cancel_at IS NULL ORDER BY created_at, id LIMIT 1
  ))
  AND step = 'submit' AND status IN ('queued', 'running') AND cancel_at IS NULL
  -- A repeat of this batch must not take a second job.
  AND NOT EXISTS (SELECT 1 FROM jobs WHERE claimer = :nonce AND status IN ('queued', 'running'))


-- name: log_claimed_submits
-- The timeline of the rows whose intent this claim has written.
INSERT INTO job_events (job_id, version, n, at, event, detail)
SELECT id, version, 0, :now, 'submitting', json_object('attempt', attempt, 'endpoint_id', endpoint_id)
FROM jobs
WHERE claimer = :nonce AND status IN ('queued', 'running') AND step = 'submitting' AND intent_version = version
ON CONFLICT DO NOTHING
RETURNING job_id, event, CAST(json_extract(detail, '$.attempt') AS INTEGER) AS attempt


-- name: claim_polls
-- Take due polls for this round. No lease and no new version: looking twice does no harm. When it is due again stands in
-- :poll_again_at by the whole minutes that it has taken, or its model usually takes if these are more; one that must stop is
-- looked at in each round.
UPDATE jobs
SET
  claimer = :nonce,
  due_at = json_extract(:poll_again_at, '$[' || min(iif(cancel_at IS NULL AND coalesce(deadline_at > :now, true), json_array_length(:poll_again_at) - 1, 0), max(
    0,
    CAST(coalesce((julianday(:now) - julianday(coalesce(submitted_at, updated_at))) * 1440, 0) AS INTEGER),
    CAST(coalesce((SELECT own.value FROM json_each(:usual_seconds) AS own WHERE own.key = coalesce(jobs.model, 'qwen-image')), 0) / 60 AS INTEGER)
  )) || ']'),
  deadline_at = coalesce(deadline_at, :deadline_at)
WHERE id IN (
  SELECT id
  FROM jobs
  WHERE status IN ('queued', 'running') AND step = 'poll' AND due_at <= :poll_due
  ORDER BY due_at
  LIMIT CAST(:limit AS INTEGER)
)


-- name: claim_stores
-- Take finished results whose lease has ended, for as long as this invocation can live.
UPDATE jobs
SET claimer = :nonce, due_at = :lease_until, version = version + 1, holds = holds + 1, updated_at = :now
WHERE id IN (
  SELECT id
  FROM jobs
  WHERE status IN ('queued', 'running') AND step = 'store' AND due_at <= :now AND holds + 1 < CAST(:suspect AS INTEGER)
  ORDER BY due_at
  LIMIT CAST(:limit AS INTEGER)
)


-- name: claim_suspect
-- The same for one result whose holders have ended without a word, just before it is begun.
UPDATE jobs
SET claimer = :nonce, due_at = :lease_until, version = version + 1, holds = holds + 1, updated_at = :now
WHERE id = :id AND version = CAST(:version AS INTEGER) AND status IN ('queued', 'running') AND step = 'store' AND due_at <= :now


-- name: select_suspect
-- The one of those that has waited longest. It is claimed when all else is done, for whoever dies before has not died of it.
SELECT id, version
FROM jobs
WHERE status IN ('queued', 'running') AND step = 'store' AND due_at <= :now AND holds + 1 >= CAST(:suspect AS INTEGER)
ORDER BY due_at
LIMIT 1


-- name: select_live
-- Whether there is anything to do, now or later.
SELECT 1 AS live FROM jobs INDEXED BY jobs_due WHERE status IN ('queued', 'running') AND step IN ('submit', 'submitting', 'poll', 'store') LIMIT 1


-- name: measure
-- How much there is of everything that is not done, and since when, in seconds, as the metrics are called. A job whose answer was
-- lost is not one that waits to be sent. One that is sent again waits since it came back.
SELECT
  count(*) FILTER (WHERE step IN ('submit', 'submitting')) AS Queued,
  max(CASE WHEN step = 'submit' THEN
    (julianday(:now) - julianday(coalesce(CASE WHEN version > 1 THEN (
      SELECT max(line.at)
      FROM job_events AS line
      WHERE line.job_id = jobs.id AND line.event IN ('created', 'retried', 'attempt_lost', 'possible_duplicate')
    ) END, created_at))) * 86400
  END) AS OldestQueued,
  count(*) FILTER (WHERE step = 'poll') AS Running,
  max(CASE WHEN step = 'poll' THEN (julianday(:now) - julianday(coalesce(submitted_at, updated_at))) * 86400 END) AS OldestRunning,
  max(CASE WHEN step = 'poll' AND runpod_status = 'IN_QUEUE' THEN (julianday(:now) - julianday(submitted_at)) * 86400 END) AS OldestWithoutWorker,
  count(*) FILTER (WHERE step = 'store') AS Storing,
  max(CASE WHEN step = 'store' THEN (julianday(:now) - julianday(coalesce(completed_at, updated_at))) * 86400 END) AS OldestStoring,
  (SELECT count(*) FROM (SELECT 1 FROM jobs AS dead WHERE dead.dead_at IS NOT NULL LIMIT 1000)) AS DeadLetters,
  (SELECT count(DISTINCT endpoint_id) FROM endpoint_faults WHERE paused_until IS NOT NULL) AS PausedEndpoints
FROM jobs INDEXED BY jobs_due
WHERE status IN ('queued', 'running') AND step IN ('submit', 'submitting', 'poll', 'store')


-- name: measure_spool
-- The files that wait in the spool.
SELECT count(*) AS SpooledFiles, sum(json_extract(file.value, '$.bytes')) AS SpooledBytes
FROM jobs INDEXED BY jobs_due, json_each(iif(json_valid(jobs.outputs), jobs.outputs, '[]')) AS file
WHERE status IN ('queued', 'running') AND step = 'store' AND json_extract(file.value, '$.spooled')


-- name: measure_waiting
-- The endpoints at which runs wait for a worker, and for how many seconds the first of them does.
SELECT endpoint_id, (julianday(:now) - julianday(min(submitted_at))) * 86400 AS seconds
FROM jobs INDEXED BY jobs_due
WHERE status IN ('queued', 'running') AND step = 'poll' AND runpod_status = 'IN_QUEUE'
GROUP BY endpoint_id
ORDER BY seconds DESC
LIMIT 10


-- name: select_claimed
-- What this nonce holds, oldest first. A submit whose intent is not of this version is not ours to send; the payload is
-- read only where it is sent.
SELECT
  id, status, step, version, attempt, failures, due_at, intent_version, runpod_job_id, endpoint_id, model,
  CASE WHEN step = 'submitting' AND coalesce(deadline_at >= :now, true) THEN prompt END AS prompt,
  CASE WHEN step = 'submitting' AND coalesce(deadline_at >= :now, true) THEN input END AS input,
  CASE WHEN step = 'submitting' THEN pictures END AS pictures,
  CASE WHEN step = 'store' THEN outputs END AS outputs,
  CASE WHEN step = 'store' THEN links END AS links,
  CASE WHEN step = 'store' THEN warnings END AS warnings,
  holds, attempt_base, started_at, deadline_at, result_until,
  created_at, updated_at, submitted_at, completed_at, cancel_at, runpod_status, queue_ms, execution_ms,
  callback_url, cost, wasted, uncosted, progress
FROM jobs
WHERE claimer = :nonce AND status IN ('queued', 'running') AND (step IN ('poll', 'store') OR (step = 'submitting' AND intent_version = version))
-- The + keeps SQLite from reading the whole table in the order of the index.
ORDER BY +created_at, id


-- name: record_accepted
-- accept: submit, submitting -> poll. That RunPod took attempt N as X is a fact, whatever was saved meanwhile: it is
-- guarded by the attempt and by there being no id yet.
UPDATE jobs
SET
  status = 'running', step = 'poll', version = version + 1, writer = :nonce, claimer = NULL, failures = 0, updated_at = :now,
  progress = NULL,
  -- An attempt that was given up for lost is known after all.
  uncosted = CASE WHEN jobs.step = 'submit' THEN max(0, jobs.uncosted - 1) ELSE jobs.uncosted END,
  runpod_job_id = json_extract(row.value, '$.runpod_job_id'),
  runpod_status = json_extract(row.value, '$.runpod_status'),
  submitted_at = json_extract(row.value, '$.submitted_at'),
  started_at = NULL,
  due_at = json_extract(row.value, '$.due_at')
FROM json_each(:accepted) AS row
WHERE jobs.id = json_extract(row.value, '$.id')
  AND jobs.attempt = json_extract(row.value, '$.attempt')
  -- A user's retry wants another run than any that was bought before it.
  AND jobs.attempt > jobs.attempt_base
  AND coalesce(jobs.runpod_job_id, '') = '' -- a table of the earlier version may have '' as its default
  AND jobs.step IN ('submit', 'submitting')


-- name: record_progress
-- How far the run of an attempt is, and whether it is looked at sooner again; no move, so that whoever makes one meanwhile
-- is not in its way.
UPDATE jobs
SET progress = json_extract(row.value, '$.progress'), due_at = min(jobs.due_at, json_extract(row.value, '$.due_at'))
FROM json_each(:further) AS row
WHERE jobs.id = json_extract(row.value, '$.id') AND jobs.step = 'poll'
  AND jobs.runpod_job_id = json_extract(row.value, '$.runpod_job_id')


-- name: save_changes
-- Any other move, if the row is still as it was read. A save ends every claim on the row, so that a claim whose answer
-- was lost cannot find it again at a later step; cancel_at is the user's and is not touched.
UPDATE jobs
SET
  version = jobs.version + 1, writer = :nonce, claimer = NULL, updated_at = :now,
  status = json_extract(row.value, '$.status'),
  step = json_extract(row.value, '$.step'),
  attempt = json_extract(row.value, '$.attempt'),
  failures = json_extract(row.value, '$.failures'),
  due_at = json_extract(row.value, '$.due_at'),
  runpod_status = json_extract(row.value, '$.runpod_status'),
  holds = json_extract(row.value, '$.holds'),
  outputs = json_extract(row.value, '$.outputs'),
  links = json_extract(row.value, '$.links'),
  warnings = json_extract(row.value, '$.warnings'),
  result_r2_key = json_extract(row.value, '$.result_r2_key'),
  result_url = json_extract(row.value, '$.result_url'),
  finished_at = json_extract(row.value, '$.finished_at'),
  error_code = json_extract(row.value, '$.error_code'),
  error_message = json_extract(row.value, '$.error_message'),
  dead_at = json_extract(row.value, '$.dead_at'),
  submitted_at = json_extract(row.value, '$.submitted_at'),
  started_at = json_extract(row.value, '$.started_at'),
  completed_at = json_extract(row.value, '$.completed_at'),
  result_until = json_extract(row.value, '$.result_until'),
  queue_ms = json_extract(row.value, '$.queue_ms'),
  execution_ms = json_extract(row.value, '$.execution_ms'),
  cost = json_extract(row.value, '$.cost'),
  wasted = json_extract(row.value, '$.wasted'),
  uncosted = json_extract(row.value, '$.uncosted'),
  progress = json_extract(row.value, '$.progress')
FROM json_each(:guarded) AS row
WHERE jobs.id = json_extract(row.value, '$.id')
  AND jobs.version = json_extract(row.value, '$.version')
  -- The + keeps SQLite from going through every live row by the index of their status.
  AND +jobs.status IN ('queued', 'running')


-- name: reopen
-- retry: error, cancelled -> submit.
-- redrive: error -> store. Only a user's verb may touch a final row.
UPDATE jobs
SET
  version = jobs.version + 1, writer = :nonce, claimer = NULL, updated_at = :now,
  status = json_extract(row.value, '$.status'),
  step = json_extract(row.value, '$.step'),
  failures = json_extract(row.value, '$.failures'),
  holds = json_extract(row.value, '$.holds'),
  attempt_base = json_extract(row.value, '$.attempt_base'),
  due_at = json_extract(row.value, '$.due_at'),
  deadline_at = json_extract(row.value, '$.deadline_at'),
  cancel_at = json_extract(row.value, '$.cancel_at'),
  runpod_job_id = json_extract(row.value, '$.runpod_job_id'),
  runpod_status = json_extract(row.value, '$.runpod_status'),
  outputs = json_extract(row.value, '$.outputs'),
  links = json_extract(row.value, '$.links'),
  warnings = json_extract(row.value, '$.warnings'),
  finished_at = NULL,
  error_code = NULL,
  error_message = NULL,
  dead_at = NULL,
  submitted_at = json_extract(row.value, '$.submitted_at'),
  started_at = json_extract(row.value, '$.started_at'),
  completed_at = json_extract(row.value, '$.completed_at'),
  result_until = json_extract(row.value, '$.result_until'),
  queue_ms = json_extract(row.value, '$.queue_ms'),
  execution_ms = json_extract(row.value, '$.execution_ms'),
  wasted = json_extract(row.value, '$.wasted'),
  progress = NULL
FROM json_each(:reopened) AS row
WHERE jobs.id = json_extract(row.value, '$.id')
  AND jobs.version = json_extract(row.value, '$.version')
  AND +jobs.status IN ('error', 'cancelled')
  AND jobs.deleted_at IS NULL


-- name: cancel_jobs
-- cancel: submit -> cancelled. RunPod has not got it.
UPDATE jobs
SET
  status = 'cancelled', step = NULL, version = version + 1, writer = :nonce, claimer = NULL,
  cancel_at = :now, finished_at = :now, updated_at = :now
WHERE id IN (SELECT value FROM json_each(:ids)) AND +status IN ('queued', 'running') AND step = 'submit'
  -- A repeat of this batch must not end a job that a user has retried since.
  AND NOT EXISTS (SELECT 1 FROM job_events AS line WHERE line.job_id = jobs.id AND line.event = 'cancelled' AND line.at = :now)


-- name: log_cancelled
-- The line for it, of this request alone.
INSERT INTO job_events (job_id, version, n, at, event, detail)
SELECT id, version, 0, :now, 'cancelled', json_object('attempt', attempt, 'by', :by)
FROM jobs
WHERE id IN (SELECT value FROM json_each(:ids)) AND writer = :nonce AND +status = 'cancelled'
ON CONFLICT DO NOTHING
RETURNING job_id, event, CAST(json_extract(detail, '$.attempt') AS INTEGER) AS attempt


-- name: tell_of_cancelled
-- The outbox for them.
INSERT INTO deliveries (job_id, version, type, url, data, created_at, due_at)
SELECT
  id, version, 'job.cancelled', callback_url,
  {told}, :now, :now
FROM jobs
WHERE id IN (SELECT value FROM json_each(:ids)) AND writer = :nonce AND +status = 'cancelled' AND callback_url IS NOT NULL
ON CONFLICT DO NOTHING


-- name: ask_to_cancel
-- RunPod has it, or may have it: whoever polls stops it there first. The version is left alone, so that the answer to a
-- paid call that is under way can still be saved.
UPDATE jobs
SET cancel_at = :now, due_at = CASE WHEN step = 'poll' THEN :now ELSE due_at END, updated_at = :now
WHERE id IN (SELECT value FROM json_each(:ids)) AND +status IN ('queued', 'running') AND step IN ('submitting', 'poll') AND cancel_at IS NULL


-- name: log_asked_to_cancel
-- A second line of the version that it was asked at. A repeat of this batch may find the job at a later one.
INSERT INTO job_events (job_id, version, n, at, event, detail)
SELECT id, version, 1, :now, 'cancel_asked', json_object('attempt', attempt, 'by', :by)
FROM jobs
WHERE id IN (SELECT value FROM json_each(:ids)) AND +status IN ('queued', 'running') AND step IN ('submitting', 'poll') AND cancel_at = :now
  AND NOT EXISTS (SELECT 1 FROM job_events AS line WHERE line.job_id = jobs.id AND line.event = 'cancel_asked' AND line.at = :now)
ON CONFLICT DO NOTHING
RETURNING job_id, event, CAST(json_extract(detail, '$.attempt') AS INTEGER) AS attempt


-- name: find_ended_before
-- The oldest jobs that ended before then, but for dead letters, whose pictures are paid for.
-- Of a time that cannot be read, as a row of the earlier version may have one, nobody knows whether it is over.
SELECT id, created_at
FROM jobs
WHERE created_at < :before AND (created_at, id) > (:created_at, :id)
  AND +status IN ('done', 'error', 'cancelled') AND dead_at IS NULL
  AND julianday(coalesce(nullif(finished_at, ''), nullif(updated_at, ''), created_at)) < julianday(:before) AND typeof(id) = 'text'
ORDER BY created_at, id
LIMIT CAST(:limit AS INTEGER)


-- name: mark_deleted
-- Before the first file goes, so that no verb can go on from a job whose files are half gone. It stays marked until all is.
UPDATE jobs
SET deleted_at = :now, version = version + 1, writer = :nonce, claimer = NULL, updated_at = :now
WHERE id IN (SELECT value FROM json_each(:ids)) AND deleted_at IS NULL
  AND +status IN (SELECT value FROM json_each(:statuses)) AND (:dead_too OR dead_at IS NULL)


-- name: log_marked
-- The line for it, of this request alone.
INSERT INTO job_events (job_id, version, n, at, event, detail)
SELECT id, version, 0, :now, 'deleting', json_object('by', :by)
FROM jobs
WHERE id IN (SELECT value FROM json_each(:ids)) AND writer = :nonce AND deleted_at = :now
ON CONFLICT DO NOTHING
RETURNING job_id, event, CAST(json_extract(detail, '$.attempt') AS INTEGER) AS attempt


-- name: select_deleted
-- Those that were deleted before; one line is left of each.
SELECT job_id FROM job_events WHERE job_id IN (SELECT value FROM json_each(:ids)) AND event = 'deleted'


-- name: forget_metadata
-- Nothing finds these jobs by their metadata any more.
DELETE FROM job_metadata
WHERE (key, value, created_at, job_id) IN (
  SELECT word.key, word.value, jobs.created_at, jobs.id
  FROM jobs, json_each(iif(json_valid(jobs.metadata), jobs.metadata, '{}')) AS word
  WHERE jobs.id IN (SELECT value FROM json_each(:ids)) AND jobs.deleted_at IS NOT NULL
)


-- name: forget_timeline
-- What happened to them, but for the last line.
DELETE FROM job_events
WHERE job_id IN (SELECT id FROM jobs WHERE id IN (SELECT value FROM json_each(:ids)) AND deleted_at IS NOT NULL)


-- name: forget_deliveries
-- What was to be told of them.
DELETE FROM deliveries
WHERE job_id IN (SELECT id FROM jobs WHERE id IN (SELECT value FROM json_each(:ids)) AND deleted_at IS NOT NULL)


-- name: forget_uploads
-- That they use pictures.
DELETE FROM job_uploads
WHERE (key, job_id) IN (
  SELECT json_extract(picture.value, '$.key'), jobs.id
  FROM jobs, json_each(iif(json_valid(jobs.pictures), jobs.pictures, '[]')) AS picture
  WHERE jobs.id IN (SELECT value FROM json_each(:ids)) AND jobs.deleted_at IS NOT NULL
)


-- name: free_uploads
-- The pictures that no other job uses are removed by a later sweep, when the addresses to put them have ended.
UPDATE uploads
SET due_at = :free_at
WHERE due_at IS NULL
  AND key IN (
    SELECT json_extract(picture.value, '$.key')
    FROM jobs, json_each(iif(json_valid(jobs.pictures), jobs.pictures, '[]')) AS picture
    WHERE jobs.id IN (SELECT value FROM json_each(:ids)) AND jobs.deleted_at IS NOT NULL
  )
  AND NOT EXISTS (SELECT 1 FROM job_uploads WHERE job_uploads.key = uploads.key)


-- name: log_deleted
-- The one line that stays, so that a repeat has its answer.
INSERT INTO job_events (job_id, version, n, at, event, detail)
SELECT id, version + 1, 0, :now, 'deleted', json_object('by', :by)
FROM jobs
WHERE id IN (SELECT value FROM json_each(:ids)) AND deleted_at IS NOT NULL
ON CONFLICT DO NOTHING
RETURNING job_id, event, CAST(json_extract(detail, '$.attempt') AS INTEGER) AS attempt


-- name: delete_jobs
-- The rows themselves, last of all.
DELETE FROM jobs
WHERE id IN (SELECT value FROM json_each(:ids)) AND +status IN ('done', 'error', 'cancelled') AND deleted_at IS NOT NULL


-- name: log_saved
-- The timeline of the rows that this batch has won, and of no other. A claim since then bumps the version and leaves the
-- writer; a batch that is repeated after it must not look like the claim's holder, so a line names the version it won.
INSERT INTO job_events (job_id, version, n, at, event, detail)
SELECT jobs.id, jobs.version, json_extract(line.value, '$.n'), :now, json_extract(line.value, '$.event'), json_extract(line.value, '$.detail')
FROM json_each(:lines) AS line
JOIN jobs ON jobs.id = json_extract(line.value, '$.id')
WHERE jobs.writer = :nonce AND jobs.version = coalesce(json_extract(line.value, '$.version'), jobs.version)
ON CONFLICT DO NOTHING


-- name: tell_of_saved
-- The outbox, for those of these rows that have ended.
INSERT INTO deliveries (job_id, version, type, url, data, created_at, due_at)
SELECT
  id, version, 'job.' || status, callback_url,
  {told}, :now, :now
FROM jobs
WHERE id IN (SELECT json_extract(value, '$.id') FROM json_each(:guarded)) AND writer = :nonce
  AND +status IN ('done', 'error', 'cancelled') AND callback_url IS NOT NULL
ON CONFLICT DO NOTHING


-- part: won
-- The outcomes that this batch has won, for the first time: their lines are written after this. An outcome that somebody else has saved
-- too, or that comes once more, says nothing new of an endpoint.
FROM json_each(:outcomes) AS outcome
JOIN jobs ON jobs.id = json_extract(outcome.value, '$.id')
WHERE jobs.writer = :nonce AND jobs.version = coalesce(json_extract(outcome.value, '$.version'), jobs.version)
  AND NOT EXISTS (SELECT 1 FROM job_events AS line WHERE line.job_id = jobs.id AND line.version = jobs.version AND line.n = 0)


-- name: forget_faults
-- What works ends the count, and the pause; those that were paused come back, to be logged.
DELETE FROM endpoint_faults
WHERE (endpoint_id, kind) IN (
  SELECT jobs.endpoint_id, json_extract(outcome.value, '$.kind')
  {won} AND json_extract(outcome.value, '$.works')
)
RETURNING endpoint_id, NULL AS paused_until, code, sentence, paused_until IS NOT NULL AS is_news


-- name: await_probes
-- A run that tries an endpoint where runs fail is under way: what comes of it is waited for.
UPDATE endpoint_faults
SET paused_until = :run_until
WHERE kind = 'run' AND probing AND endpoint_id IN (
  SELECT jobs.endpoint_id {won} AND json_extract(outcome.value, '$.works') AND json_extract(outcome.value, '$.kind') = 'call'
)


-- part: pauses_it
-- Whether one more failure pauses an endpoint: a job has tried it in vain, or there are too many in a row.
probing OR (paused_until IS NULL AND failures + excluded.failures >= json_extract(:most, '$.' || kind))


-- name: count_faults
-- What fails is counted, but where something has worked in this batch. From so many on the endpoint is paused; again and for longer,
-- where a job has tried it in vain. What else still fails there was sent before, and is only counted.
INSERT INTO endpoint_faults (endpoint_id, kind, failures, pauses, paused_until, code, sentence, since)
SELECT
  endpoint_id, kind, failures, failures >= json_extract(:most, '$.' || kind),
  iif(failures >= json_extract(:most, '$.' || kind), json_extract(:pauses, '$[0]'), NULL), code, sentence, :now
FROM (
  SELECT
    jobs.endpoint_id, json_extract(outcome.value, '$.kind') AS kind, sum(NOT json_extract(outcome.value, '$.works')) AS failures,
    max(json_extract(outcome.value, '$.works')) AS works, json_extract(outcome.value, '$.code') AS code,
    json_extract(outcome.value, '$.sentence') AS sentence
  {won}
  GROUP BY 1, 2
)
WHERE NOT works AND endpoint_id IS NOT NULL
ON CONFLICT DO UPDATE SET
  failures = failures + excluded.failures,
  paused_until = CASE
    WHEN {pauses_it}
    THEN json_extract(:pauses, '$[' || min(pauses, json_array_length(:pauses) - 1) || ']')
    ELSE paused_until
  END,
  pauses = pauses + ({pauses_it}),
  probing = 0, code = excluded.code, sentence = excluded.sentence
RETURNING endpoint_id, paused_until, code, sentence, paused_until IN (SELECT value FROM json_each(:pauses)) AS is_news


-- name: select_winners
-- The rows whose last write was this batch.
SELECT jobs.id, jobs.version
FROM json_each(:lines) AS line
JOIN jobs ON jobs.id = json_extract(line.value, '$.id')
WHERE jobs.writer = :nonce AND jobs.version = coalesce(json_extract(line.value, '$.version'), jobs.version)


-- part: waits
-- What is known of a job in our queue: how many are before it, as far as it is worth counting; how its endpoint is paused; and
-- whether RunPod has as many runs as it may have.
CASE WHEN step = 'submit' AND status IN ('queued', 'running') THEN (
  SELECT count(*)
  FROM (
    SELECT 1
    FROM jobs AS other INDEXED BY jobs_due
    WHERE other.step = 'submit' AND other.status IN ('queued', 'running') AND (other.due_at, other.id) < (jobs.due_at, jobs.id)
    LIMIT 200
  )
) END AS ahead,
CASE WHEN step = 'submit' AND status IN ('queued', 'running') THEN (
  SELECT json_object('until', max(fault.paused_until), 'failures', fault.failures, 'kind', fault.kind, 'sentence', fault.sentence)
  FROM endpoint_faults AS fault
  WHERE fault.endpoint_id = jobs.endpoint_id
  HAVING max(fault.paused_until) IS NOT NULL
) END AS paused,
CASE WHEN step = 'submit' AND status IN ('queued', 'running') AND :max_running IS NOT NULL THEN {at_runpod} >= CAST(:max_running AS INTEGER) END AS held


-- name: select_job
-- One job, whole.
SELECT * FROM jobs WHERE id = :id


-- name: select_seen_job
-- One job as it is shown.
SELECT *, {waits} FROM jobs WHERE id = :id


-- name: select_jobs
-- Several jobs, but for what RunPod is given.
SELECT
  id, runpod_job_id, status, step, prompt, model, result_r2_key, result_url, finished_at, error_message, error_code, created_at, updated_at,
  version, attempt, failures, holds, attempt_base, due_at, endpoint_id, runpod_status, outputs, links, warnings, dead_at, cancel_at,
  submitted_at, started_at, completed_at, result_until, deadline_at, queue_ms, execution_ms, metadata, priority, deadline, deleted_at,
  pictures, callback_url, cost, wasted, uncosted, progress, {waits}
FROM jobs
WHERE id IN (SELECT value FROM json_each(:ids))


-- name: select_runpod_ids
-- Which run each of these jobs has recorded.
SELECT id, runpod_job_id, attempt, status FROM jobs WHERE id IN (SELECT value FROM json_each(:ids))


-- name: select_timeline
-- What happened to one job, the last of it first.
SELECT version, n, at, event, detail FROM job_events WHERE job_id = :id ORDER BY version DESC, n DESC LIMIT 500


-- name: matching
-- The ids that a filter finds. One index finds them newest first, by the time, the status, the model or a word of the metadata,
-- and :window of them are looked at; the rest of the filter picks from those. Each status, and each model with it, is looked
-- up by itself, so that none is read but to its :each.
SELECT id
FROM jobs
WHERE id IN (
    SELECT id
    FROM (
      SELECT id, created_at
      FROM (
        SELECT id, created_at
        FROM jobs
        WHERE :lookup = 'time' AND (created_at, id) < (:from_at, :from_id) AND created_at > :after
        ORDER BY created_at DESC, id DESC
        LIMIT CAST(:each AS INTEGER)
      )
      UNION ALL
      SELECT jobs.id, jobs.created_at
      FROM json_each(:statuses) AS status
      JOIN jobs ON jobs.rowid IN (
        SELECT found.rowid
        FROM jobs AS found
        WHERE found.status = status.value AND (found.created_at, found.id) < (:from_at, :from_id) AND found.created_at > :after
        ORDER BY found.created_at DESC, found.id DESC
        LIMIT CAST(:each AS INTEGER)
      )
      WHERE :lookup = 'status'
      UNION ALL
      SELECT jobs.id, jobs.created_at
      FROM json_each(:models) AS model
      JOIN json_each(:statuses) AS status
      JOIN jobs ON jobs.rowid IN (
        SELECT found.rowid
        FROM jobs AS found
        WHERE found.model IS model.value AND found.status = status.value
          AND (found.created_at, found.id) < (:from_at, :from_id) AND found.created_at > :after
        ORDER BY found.created_at DESC, found.id DESC
        LIMIT CAST(:each AS INTEGER)
      )
      WHERE :lookup = 'model'
      UNION ALL
      SELECT job_id, created_at
      FROM (
        SELECT job_id, created_at
        FROM job_metadata
        WHERE :lookup = 'metadata' AND key = :key AND value = :value
          AND (created_at, job_id) < (:from_at, :from_id) AND created_at > :after
        ORDER BY created_at DESC, job_id DESC
        LIMIT CAST(:each AS INTEGER)
      )
    )
    ORDER BY created_at DESC, id DESC
    LIMIT CAST(:window AS INTEGER)
  )
  AND (created_at, id) < (:created_at, :id)
  AND +status IN (SELECT value FROM json_each(:statuses))
  AND (:models IS NULL OR EXISTS (SELECT 1 FROM json_each(:models) AS one WHERE one.value IS jobs.model))
  AND NOT EXISTS (
    SELECT 1
    FROM json_each(:words) AS word
    WHERE NOT EXISTS (
      SELECT 1
      FROM job_metadata AS meta
      WHERE meta.key = word.key AND meta.value = word.value AND meta.created_at = jobs.created_at AND meta.job_id = jobs.id
    )
  )
  AND (:text IS NULL OR instr(lower(prompt), lower(:text)) OR instr(lower(error_message), lower(:text)) OR id = :text)
  AND (:dead_only IS NULL OR dead_at IS NOT NULL)
-- The + keeps SQLite from reading the whole table in the order of the index.
ORDER BY +created_at DESC, id DESC
LIMIT CAST(:limit AS INTEGER)


-- name: list_jobs
-- Newest first, after the row that the cursor names.
SELECT
  id, runpod_job_id, status, step, prompt, model, result_r2_key, result_url, finished_at, error_message, error_code, created_at, updated_at,
  version, attempt, failures, due_at, runpod_status, outputs, dead_at, cancel_at, submitted_at, started_at, completed_at, result_until,
  deadline_at, queue_ms, execution_ms, metadata, priority, deadline, deleted_at,
  endpoint_id, pictures, callback_url, cost, wasted, uncosted, progress, {waits}
FROM jobs
WHERE id IN ({matching})
ORDER BY +created_at DESC, id DESC


-- name: count_jobs
-- How many there are of each status.
SELECT status, count(*) AS jobs FROM jobs WHERE id IN ({matching}) GROUP BY +status


-- name: find_jobs
-- The ids alone, with what puts them in order.
SELECT id, created_at FROM jobs WHERE id IN ({matching}) ORDER BY +created_at DESC, id DESC


-- name: list_dead_letters
-- Newest first, after the row that the cursor names; of one error_code where that is given.
SELECT
  id, runpod_job_id, status, step, prompt, model, error_message, error_code, created_at, updated_at, version, attempt, failures, due_at,
  runpod_status, endpoint_id, outputs, links, warnings, holds, attempt_base, cancel_at, started_at, deadline_at, dead_at, submitted_at, completed_at, finished_at, result_until, queue_ms, execution_ms, deleted_at,
  cost, wasted, uncosted
FROM jobs
WHERE dead_at IS NOT NULL AND (dead_at, id) < (:dead_at, :id) AND error_code = coalesce(:error_code, error_code)
ORDER BY dead_at DESC, id DESC
LIMIT CAST(:limit AS INTEGER)


-- name: list_tables
-- What the database has at all; the other questions of the doctor need tables that may not be there.
SELECT name FROM sqlite_master WHERE type = 'table'


-- name: prove_writing
-- Changes nothing, and is refused all the same where the token may only read.
UPDATE jobs SET version = version WHERE id = ''


-- name: read_survey
-- D1's clock in seconds, the last change to the schema, and the dead letters, as far as it is worth counting.
SELECT
  (julianday('now') - 2440587.5) * 86400 AS now,
  (SELECT max(number) FROM schema_changes) AS schema_change,
  (SELECT count(*) FROM (SELECT 1 FROM jobs WHERE dead_at IS NOT NULL LIMIT 1000)) AS dead_letters


-- name: read_signs_of_rounds
-- Whether rounds look at the jobs: each renews the running ones, as far as it takes, so none of those is due for long. Of the
-- others many may be due while the rounds go on; then some are not due yet, for a round has just had them. Rows of the
-- earlier version are taken up by the first round of all.
SELECT
  (SELECT count(*) FROM (
    SELECT 1 FROM jobs WHERE step = 'poll' AND status IN ('queued', 'running') AND due_at < :before LIMIT 1000
  )) AS polls,
  (SELECT count(*) FROM (
    SELECT 1 FROM jobs
    WHERE step IN ('submit', 'submitting', 'store') AND status IN ('queued', 'running') AND due_at < :before LIMIT 1000
  )) AS others,
  (SELECT count(*) FROM (
    SELECT 1 FROM jobs
    WHERE step IN ('submit', 'submitting', 'poll', 'store') AND status IN ('queued', 'running') AND due_at >= :before LIMIT 1
  )) AS had,
  (SELECT count(*) FROM (
    SELECT 1 FROM jobs
    WHERE step IN ('submit', 'submitting', 'poll', 'store') AND status IN ('queued', 'running')
      AND due_at < :long_before AND due_at > '' LIMIT 1000
  )) AS forgotten,
  (SELECT count(*) FROM (
    SELECT 1 FROM jobs
    WHERE step IS NULL AND status IN ('queued', 'running') AND coalesce(updated_at, '') < :before LIMIT 1000
  )) AS never_seen


-- name: select_paused
-- The endpoints to which nothing is sent.
SELECT endpoint_id, kind, failures, paused_until, sentence FROM endpoint_faults WHERE paused_until IS NOT NULL ORDER BY endpoint_id, kind LIMIT 20


-- name: count_failures
-- The newest jobs that were made since then and failed, by their code, with one of the sentences.
SELECT error_code, count(*) AS jobs, max(error_message) AS example
FROM (
  SELECT error_code, error_message
  FROM jobs
  WHERE status = 'error' AND (created_at, id) > (:since, '')
  ORDER BY created_at DESC, id DESC
  LIMIT 200
)
GROUP BY error_code
ORDER BY jobs DESC


-- name: offer_uploads
-- Pictures that are about to be put into the bucket.
INSERT INTO uploads (key, created_at, due_at)
SELECT value, :now, :due_at FROM json_each(:uploads) WHERE true
ON CONFLICT DO NOTHING


-- name: mark_unused
-- From now on no job may use these, so that none is removed under a job that has just been made.
UPDATE uploads
SET swept_at = :now
WHERE swept_at IS NULL AND key IN (
  SELECT key
  FROM uploads
  WHERE due_at <= :now AND NOT EXISTS (SELECT 1 FROM job_uploads WHERE job_uploads.key = uploads.key)
  ORDER BY due_at
  LIMIT CAST(:limit AS INTEGER)
)


-- name: select_marked
-- Those whose objects are to be removed, now or once more.
SELECT key FROM uploads WHERE due_at <= :now AND swept_at IS NOT NULL ORDER BY due_at LIMIT CAST(:limit AS INTEGER)


-- name: forget_swept
-- Their objects are gone.
DELETE FROM uploads WHERE key IN (SELECT value FROM json_each(:uploads)) AND swept_at IS NOT NULL


-- part: host
-- Scheme, host and port of a callback's address, which always has a path.
substr(url, 1, instr(substr(url, 9), '/') + 8)


-- name: claim_deliveries
-- Take what is due at callback addresses: of the oldest and the newest only so many of one host, so that one that is down
-- does not hold up the others. The try is counted here, for whoever makes it may end without a word.
UPDATE deliveries
SET claimer = :nonce, due_at = :lease_until, tries = tries + 1
WHERE (job_id, version) IN (
  SELECT job_id, version
  FROM (
    SELECT
      job_id, version, due_at,
      row_number() OVER (PARTITION BY {host} ORDER BY due_at, job_id, version) AS nth
    FROM (
      SELECT job_id, version, due_at, url
      FROM (SELECT job_id, version, due_at, url FROM deliveries WHERE due_at <= :now ORDER BY due_at LIMIT CAST(:window AS INTEGER))
      UNION
      SELECT job_id, version, due_at, url
      FROM (SELECT job_id, version, due_at, url FROM deliveries WHERE due_at <= :now ORDER BY due_at DESC LIMIT CAST(:window AS INTEGER))
    )
  )
  WHERE nth <= CAST(:of_host AS INTEGER)
  ORDER BY nth, due_at
  LIMIT CAST(:limit AS INTEGER)
)


-- name: claim_deliveries_of
-- The same for those of one job.
UPDATE deliveries
SET claimer = :nonce, due_at = :lease_until, tries = tries + 1
WHERE job_id = :job_id AND due_at <= :now


-- name: select_claimed_deliveries
-- What this nonce has taken, the first of each host first.
SELECT job_id, version, type, url, data, created_at, tries
FROM deliveries
WHERE due_at = :lease_until AND claimer = :nonce
ORDER BY
  row_number() OVER (PARTITION BY {host} ORDER BY created_at, job_id, version), created_at


-- name: settle_deliveries
-- What came of them; of the tries the last twenty are kept. One that was not made is not counted.
UPDATE deliveries
SET
  claimer = NULL,
  tries = tries - (json_extract(row.value, '$.line') IS NULL),
  status = json_extract(row.value, '$.status'),
  due_at = json_extract(row.value, '$.due_at'),
  log = CASE WHEN json_extract(row.value, '$.line') IS NULL THEN log ELSE json_insert(
    CASE WHEN json_array_length(log) >= 20 THEN json_remove(log, '$[0]') ELSE log END, '$[#]', json_extract(row.value, '$.line')
  ) END
FROM json_each(:rows) AS row
WHERE deliveries.job_id = json_extract(row.value, '$.job_id') AND deliveries.version = json_extract(row.value, '$.version')
  AND deliveries.claimer = :nonce


-- name: replay_delivery
-- Send it once more, with the whole schedule anew.
UPDATE deliveries
SET status = 'pending', tries = 0, claimer = NULL, due_at = :now
WHERE job_id = :job_id AND version = (
  SELECT version FROM deliveries WHERE job_id = :job_id ORDER BY version LIMIT 1 OFFSET CAST(:n AS INTEGER) - 1
)


-- name: select_deliveries
-- What was to be told of a job, oldest first.
SELECT row_number() OVER (ORDER BY version) AS n, type, url, created_at, due_at, status, tries, log
FROM deliveries
WHERE job_id = :job_id
ORDER BY version
LIMIT 100


-- name: latest
-- The newest jobs made since then, no more of them than so many.
SELECT id FROM jobs WHERE created_at > :since ORDER BY created_at DESC, id DESC LIMIT CAST(:limit AS INTEGER)


-- name: count_by_status
-- How many of them have each status, what they have cost, and when the first of them was made.
SELECT
  status, count(*) AS jobs, min(created_at) AS first, sum(cost) AS cost, sum(wasted) AS wasted, sum(uncosted) AS uncosted
FROM jobs
WHERE id IN ({latest})
GROUP BY +status


-- name: measure_spans
-- How long those took that are done, in milliseconds: all the time before the run that counted, that run, storing, and all
-- together; by nearest rank.
WITH spans AS (
  SELECT span.key AS span, span.value AS ms
  FROM jobs, json_each(json_object(
    'queue', (julianday(completed_at) - julianday(created_at)) * 86400000 - execution_ms,
    'run', execution_ms,
    'store', (julianday(finished_at) - julianday(completed_at)) * 86400000,
    'total', (julianday(finished_at) - julianday(created_at)) * 86400000
  )) AS span
  WHERE jobs.id IN ({latest}) AND +jobs.status = 'done' AND span.value IS NOT NULL
), ranked AS (
  SELECT
    span, max(0, ms) AS ms, row_number() OVER (PARTITION BY span ORDER BY ms) AS rank, count(*) OVER (PARTITION BY span) AS jobs
  FROM spans
)
SELECT
  span, jobs,
  min(CASE WHEN rank >= jobs * 0.5 THEN ms END) AS p50,
  min(CASE WHEN rank >= jobs * 0.95 THEN ms END) AS p95,
  min(CASE WHEN rank >= jobs * 0.99 THEN ms END) AS p99
FROM ranked
GROUP BY span


-- name: sum_costs
-- What they have cost, by the day that they were made on (UTC) and the model, in US dollars; NULL where nothing is known.
SELECT
  substr(created_at, 1, 10) AS day, coalesce(model, 'qwen-image') AS model, count(*) AS jobs,
  round(sum(cost), 6) AS cost, round(sum(wasted), 6) AS wasted, sum(uncosted) AS uncosted
FROM jobs
WHERE id IN ({latest})
GROUP BY 1, 2
ORDER BY 1 DESC, 2
LIMIT 1000
