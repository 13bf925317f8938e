// Prometheus' text format, as far as /metrics uses it.

/** Numbers of all models together by name, other labels as written: {"mixbit_kv_bytes{state=\"used\"}": 0, ...} */
export function parse(text) {
  const found = {};
  for (const line of text.split("\n")) {
    if (!line || line.startsWith("#")) continue;
    const end = line.lastIndexOf(" ");
    const key = line.slice(0, end).replace(/\{model="[^"]*"\}|(?<=\{)model="[^"]*",/, "");
    found[key] = (found[key] ?? 0) + Number(line.slice(end + 1));
  }
  return found;
}

/** What a counter rose by between two scrapes; from zero if the server has started anew. */
export function increase(before, now, name) {
  const value = now[name] ?? 0;
  const old = before[name] ?? 0;
  return value < old ? value : value - old;
}

/** The mean of what a histogram has seen between two scrapes; null if it has seen nothing. */
export function meanBetween(before, now, name) {
  const count = increase(before, now, `${name}_count`);
  return count ? increase(before, now, `${name}_sum`) / count : null;
}

/** A quantile of all that a histogram has seen, linear within its bucket; null if it has seen nothing. */
export function quantile(numbers, name, q) {
  const start = `${name}_bucket{le="`;
  const buckets = Object.entries(numbers)
    .filter(([key]) => key.startsWith(start))
    .map(([key, value]) => [key.slice(start.length, -2) === "+Inf" ? Infinity : Number(key.slice(start.length, -2)), value])
    .sort(([a], [b]) => a - b);
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return null;
  let [low, below] = [0, 0];
  for (const [high, count] of buckets) {
    if (count >= q * total) return high === Infinity ? low : low + ((high - low) * (q * total - below)) / (count - below);
    [low, below] = [high, count];
  }
  return low;
}
