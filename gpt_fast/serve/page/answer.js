/**
 * An answer, from its request to its end, into a message of the conversation:
 *   content, reasoning: the text so far
 *   model; first: ms to the first token; rate: tokens a second after it; tokens; thought: seconds of reasoning
 *   end: "stop", "length", ... as the server says; "stopped" by the reader; "failed", with `error`; "cut" until it ends
 */
import { Refused, ServerGone, stream } from "./api.js";

/** Fills `message`; calls `changed` after each piece. Returns what it failed with, or null. */
export async function receive(message, body, { token, signal, changed }) {
  const begun = performance.now();
  message.end = "cut";
  try {
    for await (const chunk of stream(body, { token, signal })) {
      take(message, chunk, performance.now() - begun);
      changed();
    }
    return null;
  } catch (error) {
    if (error.name === "AbortError") message.end = "stopped";
    else if (error instanceof ServerGone || error instanceof Refused) Object.assign(message, { end: "failed", error: error.message });
    else throw error;
    return message.end === "failed" ? error : null;
  } finally {
    changed();
  }
}

function take(message, chunk, now) {
  message.model = chunk.model;
  const choice = chunk.choices[0];
  const { content = "", reasoning_content: reasoning = "" } = choice?.delta ?? {};
  if (content || reasoning) {
    message.first ??= now;
    message.last = now;
  }
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  if (message.reasoning && !message.content) message.thought = (now - message.first) / 1000;
  if (content) message.content += content;
  if (choice?.finish_reason) message.end = choice.finish_reason;
  if (chunk.usage) message.tokens = chunk.usage.completion_tokens;
  if (message.tokens > 1 && message.last > message.first)
    message.rate = ((message.tokens - 1) * 1000) / (message.last - message.first);
}

/** "gpt-fast · first token 31 ms · 95.2 tokens/s · 128 tokens", as far as it is known. */
export function figures({ model, first, rate, tokens }) {
  return [
    model,
    first !== undefined && `first token ${Math.round(first)} ms`,
    rate !== undefined && `${rate.toFixed(1)} tokens/s`,
    tokens !== undefined && `${tokens} ${tokens === 1 ? "token" : "tokens"}`,
  ].filter(Boolean).join(" · ");
}

/** Why an answer is not whole; "" where it is. */
export function shortfall({ end, error }) {
  const reasons = {
    length: "Max tokens reached.",
    tool_calls: "The model calls a tool, which this page does not show.",
    stopped: "Stopped.",
    cut: "The page was left before the answer ended.",
    failed: error,
    error: "The server failed on this answer.",
  };
  return reasons[end] ?? "";
}
