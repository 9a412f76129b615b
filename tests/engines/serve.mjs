// node serve.mjs MODULES ACCOUNT DATABASE TOKEN: serves worker.mjs over an empty database at a free port of 127.0.0.1,
// and says so with its URL when it is ready. MODULES is the folder that miniflare was installed into.
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";

const [modules, ACCOUNT_ID, DATABASE_ID, API_TOKEN] = process.argv.slice(2);
const { Log, LogLevel, Miniflare } = createRequire(`${modules}/`)("miniflare");
const here = new URL(".", import.meta.url);

const miniflare = new Miniflare({
  host: "127.0.0.1",
  port: 0,
  cf: false, // else it asks Cloudflare where it is
  telemetry: { enabled: false },
  log: new Log(LogLevel.ERROR),
  modules: true,
  modulesRoot: fileURLToPath(here),
  scriptPath: fileURLToPath(new URL("worker.mjs", here)),
  compatibilityDate: "2026-04-01",
  d1Databases: { DB: DATABASE_ID },
  bindings: { ACCOUNT_ID, DATABASE_ID, API_TOKEN },
});

process.on("SIGTERM", async () => {
  await miniflare.dispose();
  process.exit(0);
});
console.log(`ready ${(await miniflare.ready).origin}`);
