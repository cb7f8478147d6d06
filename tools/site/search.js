/* Search of the site. It stands where smalldocs loads Fuse, and ranks whole words: a word in a title counts more than one
   in a heading, a symbol or the text; words that everybody writes count nothing; some words have others that mean the same. */
(() => {
  const STOP = new Set(("a an and are as at be by can do does for from get has have how i in into is it its me my of on or our " +
    "that the their there this to use used using want what when where which why with without you your last").split(" "));
  const SAME = {
    gpu: ["gpus", "processes", "distributed"], gpus: ["gpu", "processes"], multi: ["many", "several"], off: ["off_after"],
    epochs: ["epoch"], resume: ["checkpoint", "checkpoints", "stopped"], checkpoint: ["checkpoints", "resume"],
    install: ["installs", "pip", "clone"], vit: ["transformer", "transformers", "deit", "swin"], colab: ["install", "quickstart"],
    lambda: ["ratio", "share"], callback: ["learner"], cli: ["shell", "sumix_train"], command: ["shell"], loss: ["cross-entropy"],
    ddp: ["processes", "distributed"], huggingface: ["hugging", "face"], notebook: ["notebooks"], dataset: ["images", "loaders"],
  };
  const words = (text) => (text.toLowerCase().match(/[\p{L}\p{N}_]+/gu) || []);
  const FIELDS = [["title", 8], ["section", 5], ["text", 1]];

  // How well `word` is met by the counted words of a field: whole, as a beginning, or not at all
  const meets = (counts, word) => {
    const whole = counts.get(word) || 0;
    if (whole) return 1 + Math.min(whole, 5) / 10;
    if (word.length < 4) return 0;
    for (const found of counts.keys()) if (found.startsWith(word) || (found.length > 4 && word.startsWith(found))) return 0.6;
    return 0;
  };
  const count = (list) => list.reduce((counts, word) => counts.set(word, (counts.get(word) || 0) + 1), new Map());

  class Search {
    constructor(entries) {
      this.entries = entries.map((item) => ({ item, fields: FIELDS.map(([name, weight]) => [count(words(item[name] || "")), weight]) }));
    }
    score(fields, word) { return Math.max(...fields.map(([counts, weight]) => weight * meets(counts, word))); }
    search(query, { limit }) {
      const all = words(query), kept = all.filter((word) => !STOP.has(word));
      const asked = (kept.length ? kept : all).map((word) => [word, ...(SAME[word] || [])]);
      const rarity = asked.map(([word]) => {
        const n = this.entries.filter(({ fields }) => this.score(fields, word) > 0).length;
        return Math.log(1 + this.entries.length / (1 + n));
      });
      const hits = [];
      for (const { item, fields } of this.entries) {
        const scores = asked.map((group, k) => rarity[k] * Math.max(...group.map((word, i) => this.score(fields, word) * (i ? 0.7 : 1))));
        const met = scores.filter((score) => score > 0).length;
        if (met) hits.push({ item, score: scores.reduce((a, b) => a + b, 0) * (met / asked.length) ** 2 * (item.section ? 1 : 1.2) });
      }
      hits.sort((a, b) => b.score - a.score);
      const seen = new Map();  // at most two sections of a page
      const few = hits.filter(({ item }) => {
        const page = item.href.split("#")[0], n = seen.get(page) || 0;
        seen.set(page, n + 1);
        return n < 2;
      });
      return few.slice(0, limit);
    }
  }
  globalThis.Fuse = Search;
})();
