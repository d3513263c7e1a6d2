/** The server that the page came from: what it serves, and an answer as it streams. */

const root = location.pathname.replace(/\/chat\/?$/, "");

/** Nobody answers, or the answer broke off: the server has gone, or the way to it. */
export class ServerGone extends Error {}

/** The server answered that it will not. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  /** Whether it asks for a key: the ASGI door says 401; TorchServe 400, and what it misses. */
  get asksForKey() {
    return this.status === 401 || (/token/i.test(this.message) && /auth/i.test(this.message));
  }
}

async function ask(path, { token, ...options }) {
  const headers = { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(root + path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerGone("The server does not answer");
  }
  if (!response.ok) throw new Refused(response.status, await message(response));
  return response;
}

async function message(response) {
  const text = await response.text();
  try {
    const body = JSON.parse(text);
    return (body.error ?? body).message || text;
  } catch {
    return text || `The server answered ${response.status}`;
  }
}

/** The name of the model that is served. */
export async function model(token) {
  const response = await ask("/v1/models", { token });
  return (await response.json()).data[0].id;
}

/** The chunks of a chat completion. Throws ServerGone, Refused, or an AbortError when `signal` stops it. */
export async function* stream(body, { token, signal }) {
  const response = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), token, signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(500, chunk.error.message);
    yield chunk;
  }
  throw new ServerGone("The connection ended before the answer did");
}

/** The data of server-sent events. A connection that breaks ends them. */
async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      return;
    }
    if (part.done) return;
    const frames = (rest + part.value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) if (frame.startsWith("data: ")) yield frame.slice(6);
  }
}
