// Numbers for people.

export const count = (value) => Math.round(value).toLocaleString("en");

/** 134515008 -> "134.5 M" */
export function short(value) {
  const names = ["", " k", " M", " G", " T"];
  let power = 0;
  while (Math.abs(value) >= 1000 && power < names.length - 1) [value, power] = [value / 1000, power + 1];
  return `${power && value < 100 ? value.toFixed(1) : Math.round(value)}${names[power]}`;
}

/** Bytes in powers of 1000, as `mixbit inspect` prints them: 75.9 MB */
export function bytes(value) {
  const text = short(value);
  return text.includes(" ") ? `${text}B` : `${text} B`;
}

/** Seconds: "85 ms", "1.24 s", "2 min 5 s". */
export function seconds(value) {
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export const rate = (value) => `${value < 100 ? value.toFixed(1) : Math.round(value)} tok/s`;

export const share = (value) => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;

export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
