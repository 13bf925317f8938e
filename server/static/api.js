// The server's API: requests with the key, errors as one type, and streams of events.

const KEY = "mixbit.key";

/** The API key, kept for this tab alone. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

/** What went wrong. status: of HTTP; 0 if there was no answer, null if a running answer broke off. */
export class ApiError extends Error {
  constructor(status, message, { code = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

/** Fetch `path`. Throws ApiError, or the browser's AbortError. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey.get()) headers.authorization = `Bearer ${apiKey.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "There is no answer from the server. Does it still run?");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  throw new ApiError(response.status, error?.message ?? response.statusText, { ...error, retryAfter });
}

export const getJson = async (path) => (await request(path)).json();
export const modelPath = (id) => `/v1/models/${encodeURIComponent(id)}`;

/** The data of each server-sent event in a body. Comments are left out. */
export async function* events(body) {
  let text = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Chunks of a streamed chat completion. Throws ApiError if the server says so, or goes silent before the end. */
export async function* streamChat(body, signal) {
  const response = await request("/v1/chat/completions", {
    body: { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(null, chunk.error.message, chunk.error);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(null, "The connection broke off.");
  }
  throw new ApiError(null, "The connection ended in the middle of the answer.");
}
