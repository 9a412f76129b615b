// D1's REST API over a binding to the engine itself: statements, transactions and errors are the engine's own, the
// envelope, the statuses and the codes are those that the live API has been seen to answer.

const PATH = /^\/client\/v4\/accounts\/([^/]+)\/d1\/database\/([^/]+)\/query$/;

// A whole quoted text or name, a comment, or any one character.
const TOKEN = /'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^\]]*\]|--[^\n]*|\/\*[\s\S]*?\*\/|[\s\S]/g;

class Refusal extends Error {
  constructor(status, code, message) {
    super(message);
    Object.assign(this, { status, code });
  }
}

const malformed = (why) => new Refusal(400, 7400, `The request is malformed: ${why}`);

function answer(status, body) {
  const headers = { ratelimit: '"default";r=1199;t=1', "ratelimit-policy": '"default";q=1200;w=300' };
  return Response.json({ errors: [], messages: [], ...body }, { status, headers });
}

// The schema has no triggers, whose bodies have semicolons of their own.
function split(sql) {
  const statements = [""];
  for (const [token] of sql.matchAll(TOKEN)) {
    if (token === ";") statements.push("");
    else if (!/^(--|\/\*)/.test(token)) statements[statements.length - 1] += token;
  }
  return statements.map((statement) => statement.trim()).filter(Boolean);
}

function read({ sql, params = [] }) {
  if (typeof sql !== "string") throw malformed("missing field `sql`");
  const bindable = (value) => value === null || ["string", "number", "boolean"].includes(typeof value);
  if (!Array.isArray(params) || !params.every(bindable)) throw malformed("invalid params");
  const statements = split(sql);
  if (statements.length > 1 && params.length) throw malformed("params with multiple statements is not supported");
  return statements.map((statement) => [statement, params]);
}

async function statementsOf(request) {
  const body = await request.json().catch(() => { throw malformed("no JSON"); });
  const statements = [body?.batch ?? [body ?? {}]].flat().flatMap(read);
  if (!statements.length) throw new Refusal(400, 7500, "No SQL statements detected.");
  return statements;
}

function database(request, env) {
  const [, account, id] = PATH.exec(new URL(request.url).pathname) ?? [];
  if (!id || request.method !== "POST") throw new Refusal(404, 7003, "Could not route to this path.");
  if (request.headers.get("authorization") !== `Bearer ${env.API_TOKEN}`) {
    throw new Refusal(401, 10000, "Authentication error");
  }
  if (account !== env.ACCOUNT_ID) {
    throw new Refusal(403, 7403, "The given account is not valid or is not authorized to access this service");
  }
  if (id !== env.DATABASE_ID) throw new Refusal(404, 7404, `The database ${id} could not be found`);
  return env.DB;
}

async function run(db, statements) {
  const bound = ([sql, params]) => (params.length ? db.prepare(sql).bind(...params) : db.prepare(sql));
  try {
    return await db.batch(statements.map(bound));
  } catch (error) {
    throw new Refusal(400, 7500, error.message.replace(/^D1_(EXEC_)?ERROR: /, ""));
  }
}

export default {
  async fetch(request, env) {
    try {
      const db = database(request, env);
      const results = await run(db, await statementsOf(request));
      const result = results.map(({ results, meta }) => ({ results, success: true, meta }));
      return answer(200, { success: true, result });
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      const { status, code, message } = error;
      return answer(status, { success: false, result: null, errors: [{ code, message }] });
    }
  },
};
