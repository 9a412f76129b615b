"""
Is the simulation worth anything? Each mutant breaks one rule of the protocol in a copy of the code, and must be caught.

    python -m tests.simulation.mutants           all of them, one after the other
    python -m tests.simulation.mutants NAME …    some
"""

import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEEDS = 300  # that a mutant must survive to be called uncaught


@dataclass(frozen=True)
class Mutant:
    """One text of one file and what stands in its place."""

    name: str
    file: str
    old: str
    new: str


INTENT = """step = 'submitting', version = version + 1, intent_version = version + 1, attempt = attempt + 1,
runpod_job_id = NULL,"""

GUARDS = """  AND jobs.version = json_extract(row.value, '$.version')
  -- The + keeps SQLite from going through every live row by the index of their status.
  AND +jobs.status IN ('queued', 'running')"""

SAVE_AND_TELL = """        names += ["log_saved", "tell_of_saved", "select_winners"]
        *_, winners = self._run(names, values, timeout=timeout, to_the_last=True)
"""

MARK_AND_SELECT = """SET swept_at = :now
WHERE swept_at IS NULL AND key IN (
  SELECT key
  FROM uploads
  WHERE due_at <= :now AND NOT EXISTS (SELECT 1 FROM job_uploads WHERE job_uploads.key = uploads.key)
  ORDER BY due_at
  LIMIT CAST(:limit AS INTEGER)
)


-- name: select_marked
-- Those whose objects are to be removed, now or once more.
SELECT key FROM uploads WHERE due_at <= :now AND swept_at IS NOT NULL ORDER BY due_at LIMIT CAST(:limit AS INTEGER)"""
ONLY_SELECT = """SET swept_at = NULL WHERE :limit < 0 AND :now IS NULL


-- name: select_marked
-- Those that nobody uses.
SELECT key
FROM uploads
WHERE due_at <= :now AND NOT EXISTS (SELECT 1 FROM job_uploads WHERE job_uploads.key = uploads.key)
ORDER BY due_at
LIMIT CAST(:limit AS INTEGER)"""

MUTANTS = [
    Mutant(
        "a delete does not mark the row",
        "queries.sql",
        "SET deleted_at = :now, version = version + 1, writer",
        "SET deleted_at = :now, writer",
    ),
    Mutant(
        "the row goes before its files",
        "removal.py",
        "        came |= self._remove_files([job for job in rows if came[job.id] is None], deadline)\n",
        "",
    ),
    Mutant(
        "a live row is marked as deleted",
        "queries.sql",
        "AND deleted_at IS NULL\n  AND +status IN (SELECT value FROM json_each(:statuses))",
        "AND deleted_at IS NULL",
    ),
    Mutant(
        "no version guard",
        "queries.sql",
        GUARDS,
        "  AND +jobs.status IN ('queued', 'running')",
    ),
    Mutant(
        "no guard of final rows",
        "queries.sql",
        GUARDS,
        "",
    ),
    Mutant(
        "paid call before the intent is written",
        "pipeline.py",
        "        claimed = [job for job in made if job.state is State.SUBMITTING]\n",
        "        claimed = [job for job in made if job.state is State.SUBMITTING]\n"
        "        self._send_all(claimed, deadline)\n",
    ),
    Mutant(
        "intent without an attempt",
        "queries.sql",
        INTENT,
        INTENT.replace(" attempt = attempt + 1,", ""),
    ),
    Mutant(
        "a new nonce for every try of a save",
        "saver.py",
        "                self._keep_batches([batch])\n            raise",
        "                self.keep(batch.changes)\n            raise",
    ),
    Mutant(
        "a doubtful claim's nonce is forgotten",
        "rounds.py",
        "            self.doubtful.put(nonce)\n",
        "",
    ),
    Mutant(
        "stored before it is saved",
        "rounds.py",
        "        self._go_on(self.saver.save(changes, self.deadline))",
        "        saved = self.saver.save(changes, self.deadline)\n"
        "        self._go_on(Saved(won=changes, error=saved.error))",
    ),
    Mutant(
        "done without a put",
        "results.py",
        "            self.bucket.put(key, content, content_type=content_type, deadline=until)\n",
        "            pass\n",
    ),
    Mutant(
        "the loser writes its event",
        "queries.sql",
        "WHERE jobs.writer = :nonce AND jobs.version = coalesce(json_extract(line.value, '$.version'), jobs.version)\n"
        "ON CONFLICT DO NOTHING",
        "WHERE true\nON CONFLICT DO NOTHING",
    ),
    Mutant(
        "D1's Retry-After is ignored",
        "d1.py",
        "            self._locked = Until(self._clock, reply.retry_after)\n",
        "            pass\n",
    ),
    Mutant(
        "RunPod's Retry-After is ignored",
        "moves.py",
        "    wait = retry.seconds_to_wait(retry.SUBMIT, failures, rng=rng, retry_after=error.retry_after)\n",
        "    wait = retry.seconds_to_wait(retry.SUBMIT, failures, rng=rng)\n",
    ),
    Mutant(
        "a lease of zero",
        "rounds.py",
        "        return max(0.0, self.deadline.left()) + LEASE_MARGIN",
        "        return 0.0",
    ),
    Mutant(
        "rows that are given back are forgotten",
        "rounds.py",
        "            return Outcome(change=moves.return_unsent(job, now=self.clock.now()))",
        "            return Outcome()",
    ),
    Mutant(
        "a cancel changes the version",
        "queries.sql",
        "SET cancel_at = :now, due_at = CASE WHEN step = 'poll' THEN :now ELSE due_at END, updated_at = :now",
        "SET cancel_at = :now, due_at = CASE WHEN step = 'poll' THEN :now ELSE due_at END, updated_at = :now,"
        " version = version + 1",
    ),
    Mutant(
        "a cancelled job is sent again",
        "queries.sql",
        "SET status = 'cancelled', step = NULL, version = version + 1, claimer = NULL, finished_at = :now,"
        " updated_at = :now\nWHERE status IN ('queued', 'running') AND cancel_at IS NOT NULL AND step = 'submit'",
        "SET cancel_at = NULL\nWHERE status IN ('queued', 'running') AND cancel_at IS NOT NULL AND step = 'submit'",
    ),
    Mutant(
        "adoption by version",
        "queries.sql",
        "  AND jobs.attempt = json_extract(row.value, '$.attempt')\n",
        "  AND jobs.version = json_extract(row.value, '$.version')\n",
    ),
    Mutant(
        "adoption of any attempt",
        "queries.sql",
        "  AND jobs.attempt = json_extract(row.value, '$.attempt')\n",
        "",
    ),
    Mutant(
        "an accepted run that lost is left running",
        "saver.py",
        "                self._keep_orphans([change])\n                self._orphans_due",
        "                self._orphans_due",
    ),
    Mutant(
        "an accepted run is stopped without a second look",
        "saver.py",
        "            if row is None or _is_superseded(row, change.job):\n",
        "            if True:\n",
    ),
    Mutant(
        "a 502 to /run is a refusal",
        "runpod.py",
        '    return IndeterminateError(\n        "runpod_bad_answer", f"RunPod gave no usable answer{said}."',
        '    return TransientError(\n        "runpod_bad_answer", f"RunPod gave no usable answer{said}."',
    ),
    Mutant(
        "an early 404 is believed",
        "steps.py",
        " < NOT_INDEXED_YET:\n",
        " < timedelta(0):\n",
    ),
    Mutant(
        "a worker's failure is bought again",
        "retry.py",
        "        return retryable and made < self.maximum",
        "        return made < self.maximum",
    ),
    Mutant(
        "attempts without end",
        "retry.py",
        "        return retryable and made < self.maximum",
        "        return retryable",
    ),
    Mutant(
        "an unknown word is the end",
        "runpod.py",
        "    return Verdict(status) if status in final else Verdict.UNFINISHED",
        '    return Verdict(status) if status in final or status == "IN_QUEUE" or status == "IN_PROGRESS" and False'
        ' else Verdict.UNFINISHED if status in ("IN_QUEUE", "IN_PROGRESS") else Verdict.FAILED',
    ),
    Mutant(
        "a cancel wins over COMPLETED",
        "steps.py",
        "            case Verdict.COMPLETED:\n",
        "            case Verdict.COMPLETED if job.cancel_at:\n"
        "                return self._stopped(job, _cancelled(), seen)\n"
        "            case Verdict.COMPLETED:\n",
    ),
    Mutant(
        "cancelled without RunPod's word",
        "steps.py",
        "            case Verdict.UNFINISHED if why and self._waited_enough(job, now, told=told):",
        "            case Verdict.UNFINISHED if why:",
    ),
    Mutant(
        "no deadline for a run that waits",
        "deadlines.py",
        "        if runpod_status == IN_QUEUE and job.started_at is None and",
        "        if False and",
    ),
    Mutant(
        "holders are not counted",
        "queries.sql",
        " holds = holds + 1, updated_at = :now\nWHERE id IN (",
        " updated_at = :now\nWHERE id IN (",
    ),
    Mutant(
        "a save does not forget the holders",
        "queries.sql",
        "  holds = json_extract(row.value, '$.holds'),\n  outputs = json_extract(row.value, '$.outputs'),",
        "  outputs = json_extract(row.value, '$.outputs'),",
    ),
    Mutant(
        "a retry keeps the old result",
        "moves.py",
        '        "outputs",\n        "links",\n        "warnings",\n        "error_code",',
        '        "links",\n        "warnings",\n        "error_code",',
    ),
    Mutant(
        "a retry keeps the old run",
        "moves.py",
        '        "runpod_job_id",\n        "runpod_status",\n        "outputs",',
        '        "runpod_status",\n        "outputs",',
    ),
    Mutant(
        "a user's verb without a version",
        "queries.sql",
        "FROM json_each(:reopened) AS row\nWHERE jobs.id = json_extract(row.value, '$.id')\n"
        "  AND jobs.version = json_extract(row.value, '$.version')\n",
        "FROM json_each(:reopened) AS row\nWHERE jobs.id = json_extract(row.value, '$.id')\n",
    ),
    Mutant(
        "RunPod is not needed any more, though it is",
        "results.py",
        "        complete = all(stem in settled | failed or stem in kept for stem in stems)\n",
        "        complete = True\n",
    ),
    Mutant(
        "the spool is never read",
        "results.py",
        "        if file and _is_spooled(file):\n            waiting.append((stem, Spooled(file)))\n        elif",
        "        if",
    ),
    Mutant(
        "a callback's token is not checked",
        "webhooks.py",
        "        if not genuine or not hmac",
        "        if not genuine or False and not hmac",
    ),
    Mutant(
        "a callback is believed without asking",
        "steps.py",
        "        if answer.verdict in (Verdict.NOT_FOUND, Verdict.CANCELLED):\n            return None\n",
        "",
    ),
    Mutant(
        "the second attempt overwrites the first one's picture",
        "jobs.py",
        '    attempt = "" if job.attempt <= 1 else f"{job.attempt}/"\n',
        '    attempt = ""\n',
    ),
    Mutant(
        "a claim hides whose save won",
        "queries.sql",
        "  claimer = :nonce,\n  due_at = json_extract(",
        "  claimer = :nonce, writer = :nonce,\n  due_at = json_extract(",
    ),
    Mutant(
        "an old run undoes a retry",
        "queries.sql",
        "  AND jobs.attempt > jobs.attempt_base\n",
        "",
    ),
    Mutant(
        "a redrive where nothing is left",
        "steps.py",
        "        return self._ask(job, deadline, reserve=SAVE_RESERVE).verdict is Verdict.COMPLETED\n",
        "        return True\n",
    ),
    Mutant(
        "an end is saved and not told",
        "store.py",
        '"log_saved", "tell_of_saved", "select_winners"]',
        '"log_saved", "select_winners"]',
    ),
    Mutant(
        "a cancel is not told",
        "store.py",
        '            "tell_of_cancelled",\n',
        "",
    ),
    Mutant(
        "a cancel by a claim is not told",
        "store.py",
        '            "tell_of_waiting",\n',
        "",
    ),
    Mutant(
        "an end is told in a batch of its own",
        "store.py",
        SAVE_AND_TELL,
        SAVE_AND_TELL.replace('"tell_of_saved", ', "")
        + '        self._run(["tell_of_saved"], values, timeout=timeout)\n',
    ),
    Mutant(
        "what came of a callback is written by whoever comes",
        "queries.sql",
        "  AND deliveries.claimer = :nonce\n\n\n-- name: replay_delivery",
        "\n\n\n-- name: replay_delivery",
    ),
    Mutant(
        "a claim of callbacks without a lease",
        "courier.py",
        "            lease=max(0.0, deadline.left()) + LEASE_MARGIN,\n",
        "            lease=0.0,\n",
    ),
    Mutant(
        "410 is tried again",
        "courier.py",
        '        return "It wants to hear nothing more (410).", None, True\n',
        '        return "It wants to hear nothing more (410).", None, False\n',
    ),
    Mutant(
        "every try has an id of its own",
        "courier.py",
        'f"msg_{delivery.job_id}_{delivery.version}", self',
        'f"msg_{delivery.job_id}_{delivery.version + delivery.tries}", self',
    ),
    Mutant(
        "a redirect is heard",
        "courier.py",
        "    if 200 <= answer.status < 300:\n",
        "    if 200 <= answer.status < 400:\n",
    ),
    Mutant(
        "only the first secret signs",
        "courier.py",
        "for secret in self.secrets),\n",
        "for secret in self.secrets[:1]),\n",
    ),
    Mutant(
        "a round waits for the receivers",
        "pipeline.py",
        "                # Beside the rounds, which no receiver may delay.\n                errands.start(",
        "                (lambda tell: tell())(",
    ),
    Mutant(
        "one host may have all that is told at a time",
        "queries.sql",
        "  WHERE nth <= CAST(:of_host AS INTEGER)\n",
        "  WHERE nth <= 1000 * CAST(:of_host AS INTEGER)\n",
    ),
    Mutant(
        "a create does not look whether its picture is there",
        "queries.sql",
        "    WHERE NOT EXISTS (SELECT 1 FROM uploads WHERE uploads.key = wanted.value AND uploads.swept_at IS NULL)\n",
        "    WHERE false\n",
    ),
    Mutant(
        "a sweep does not mark first",
        "queries.sql",
        MARK_AND_SELECT,
        ONLY_SELECT,
    ),
    Mutant(
        "a sweep forgets what it could not remove",
        "uploads.py",
        '            log.failed("upload_not_removed", error)\n            return None\n',
        '            log.failed("upload_not_removed", error)\n',
    ),
    Mutant(
        "nobody knows which job uses a picture",
        "store.py",
        '"file_metadata", "use_uploads", "keep_uploads"',
        '"file_metadata", "keep_uploads"',
    ),
    Mutant(
        "the pictures of deleted jobs stay",
        "store.py",
        '"forget_uploads", "free_uploads"',
        '"forget_uploads"',
    ),
    Mutant(
        "a copy is put before it is written down",
        "uploads.py",
        "            self._write_down(fetched, deadline)\n        with self.new_crew",
        "            pass\n        with self.new_crew",
    ),
    Mutant(
        "a claim does not look whether an endpoint is paused",
        "queries.sql",
        "          AND NOT ({is_paused})\n        ORDER BY due_at\n        LIMIT CAST(:limit AS INTEGER)\n",
        "        ORDER BY due_at\n        LIMIT CAST(:limit AS INTEGER)\n",
    ),
    Mutant(
        "a create does not look whether an endpoint is paused",
        "queries.sql",
        "WHERE fault.endpoint_id = json_extract(value, '$.endpoint_id') AND fault.paused_until IS NOT NULL",
        "WHERE false",
    ),
    Mutant(
        "two jobs try a paused endpoint",
        "queries.sql",
        "SET probing = 1, paused_until = :probe_until\n",
        "SET probing = 1\n",
    ),
    Mutant(
        "an endpoint stays paused where its last job died",
        "queries.sql",
        "        HAVING max(paused_until) <= :now\n",
        "        HAVING max(paused_until) <= :now AND NOT max(probing)\n",
    ),
    Mutant(
        "what works does not end a pause",
        "store.py",
        '["forget_faults", "await_probes", "count_faults"]',
        '["await_probes", "count_faults"]',
    ),
    Mutant(
        "a claim does not look how many runs there are",
        "queries.sql",
        "ELSE runs + {at_runpod} <= CAST(:max_running AS INTEGER) END",
        "ELSE true END",
    ),
    Mutant(
        "a create does not look how many runs there are",
        "queries.sql",
        "ELSE key + {before} < CAST(:max_running AS INTEGER) END",
        "ELSE true END",
    ),
]


def hunt() -> str:
    """What catches the code that is here: a window, a crash point, a seed; empty if nothing does."""
    from tests.simulation.crashes import STORIES, single_kills, tell
    from tests.simulation.scenario import run_seed
    from tests.simulation.windows import WINDOWS, run_window

    for name in WINDOWS:
        try:
            run_window(name)
        except BaseException as error:  # a Violation, or the mutant's own crash
            return f"window {name}: {_words(error)}"
    for story in STORIES:
        try:
            for kills in single_kills(story):
                tell(story, kills)
        except BaseException as error:
            return f"crash points of {story}: {_words(error)}"
    for seed in range(SEEDS):
        if violation := run_seed(seed).violation:
            return f"seed {seed}: {violation.partition(': ')[2][:120]}"
    return ""


def _words(error: BaseException) -> str:
    text = str(error).partition(": ")[2] or repr(error)
    return text[:120].replace("\n", " ")


def try_mutant(mutant: Mutant) -> tuple[str, float]:
    """Apply it to a copy and hunt it; what caught it, and the seconds that took."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "chalicelib", copy / "chalicelib", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("tests", "tools", "schema.sql"):
            (copy / name).symlink_to(ROOT / name)
        path = copy / "chalicelib" / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.name}: its text stands {text.count(mutant.old)} times in {mutant.file}")
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        begun = time.monotonic()
        code = "from tests.simulation.mutants import hunt; print(hunt())"
        run = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
        lines = run.stdout.strip().splitlines()
        return (lines[-1] if lines else run.stderr.strip()[-120:]), time.monotonic() - begun


def main(names: list[str]) -> int:
    """The command; the number of mutants that nothing caught."""
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    uncaught = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, (caught, seconds) in zip(chosen, pool.map(try_mutant, chosen), strict=True):
            uncaught += not caught
            print(f"{mutant.name:52} {seconds:5.1f} s  {caught or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - uncaught} caught")
    return uncaught


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
