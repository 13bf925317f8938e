// Charts of /metrics, read once a second while they are looked at.

import { request } from "./api.js";
import { chart } from "./chart.js";
import { h } from "./dom.js";
import { bytes, count, plural, rate, seconds, share } from "./format.js";
import { increase, meanBetween, parse, quantile } from "./prometheus.js";

const [PERIOD, FIRST] = [1000, 200];
const TTFT = "mixbit_time_to_first_token_seconds";
const BETWEEN = "mixbit_inter_token_seconds";
const [PROMPT, CACHED, OUTPUT] = ["mixbit_prompt_tokens_total", "mixbit_cached_tokens_total", "mixbit_completion_tokens_total"];

/** The charts, started and stopped by their methods. */
export function liveCharts() {
  let capacity = 0;
  const one = (name, shape = "area") => [{ name, shape, class: "c1" }];
  const queue = chart({ title: "Requests", format: count, floor: 4, series: [{ name: "running", shape: "area", class: "c1" }, { name: "waiting", shape: "area", class: "c2" }] });
  const speed = chart({ title: "Output", format: rate, floor: 10, series: one("tokens") });
  const first = chart({ title: "Time to first token", format: seconds, floor: 0.1, series: one("mean", "dots") });
  const between = chart({ title: "Between tokens", format: seconds, floor: 0.01, series: one("mean", "line") });
  const memory = chart({ title: "KV cache", format: bytes, limit: () => capacity || 1, series: [{ name: "in use", shape: "area", class: "c1" }, { name: "kept for later prompts", shape: "area", class: "c3" }] });
  const hits = chart({ title: "Prompt tokens from the cache", format: share, limit: () => 1, series: one("share") });
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const element = h("div", { class: "charts" }, ...[speed, first, between, queue, memory, hits].map(({ card }) => card));
  let [timer, before, at, drawn, generation] = [0, null, 0, false, 0];

  function show(now, elapsed) {
    const typical = (name) => {
      const [half, most] = [quantile(now, name, 0.5), quantile(now, name, 0.95)];
      return half === null ? "" : `since the start: half under ${seconds(half)}, 95 % under ${seconds(most)}`;
    };
    const [running, waiting] = [now.mixbit_requests_running, now.mixbit_requests_waiting];
    queue.push([running, waiting], { text: `${count(running)} running`, said: `${count(waiting)} waiting · ${plural(now['mixbit_requests_total{outcome="completed"}'], "request")} completed` });
    const perSecond = increase(before, now, OUTPUT) / elapsed;
    speed.push([perSecond], { text: rate(perSecond), said: `${plural(now[OUTPUT], "token")} since the start` });
    const [ttft, gap] = [meanBetween(before, now, TTFT), meanBetween(before, now, BETWEEN)];
    first.push([ttft], { text: ttft === null ? "-" : seconds(ttft), said: typical(TTFT) });
    between.push([gap], { text: gap === null ? "-" : seconds(gap), said: typical(BETWEEN) });
    const [used, kept] = [now['mixbit_kv_bytes{state="used"}'], now['mixbit_kv_bytes{state="cached"}']];
    capacity = now.mixbit_cache_bytes;
    memory.push([used, kept], { text: bytes(used + kept), said: `${bytes(used)} in use, ${bytes(kept)} kept, of ${bytes(capacity)}` });
    const hit = now[PROMPT] ? now[CACHED] / now[PROMPT] : 0;
    hits.push([hit], { text: now[PROMPT] ? share(hit) : "-", said: `${count(now[CACHED])} of ${plural(now[PROMPT], "token")} were not computed again` });
  }

  async function poll(mine) {
    try {
      if (!document.hidden) {
        const now = parse(await (await request("/metrics")).text());
        if (mine !== generation) return;
        const time = performance.now();
        if (before) {
          show(now, (time - at) / 1000);
          drawn = true;
        }
        [before, at] = [now, time];
        problem.hidden = true;
      }
    } catch (error) {
      problem.textContent = `The numbers cannot be read: ${error.message}`;
      problem.hidden = false;
    }
    const wait = drawn ? PERIOD : FIRST; // two samples make the first point
    if (mine === generation) timer = setTimeout(poll, wait, mine);
  }

  return {
    elements: [problem, element],
    start: () => poll(++generation),
    stop: () => {
      generation += 1;
      clearTimeout(timer);
    },
  };
}
