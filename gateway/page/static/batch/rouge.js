// ROUGE-L as the course's judge reads it: Latin letters and digits alone. Pure: two texts in, a figure
// out. The judge cuts texts with jieba first, which parts a few such words; how is here, its dictionary
// is not.

const WORD = /[A-Za-z0-9]+(?:\.\d+)?%?|[\u0130\u212A]/g; // the last two become i and k
const LETTERS = /[a-z0-9]+/g;
// jieba's words of Latin letters and Chinese: `NTFSC盘` is cut before `C盘`.
const MIXED = new RegExp(
  [
    "AT&T|[Cc]#|[Cc]\\+\\+|4[Ss]店|1号店|AA制|AB型|[ABO]型|[ABH]股|[ABCDEFG]座|[AB]轮|B超|BB机|BP机|[CDEFGHITUZ]盘|CALL机|CD[盒机]|C语言|[DQ]版",
    "E[化通]|IC卡|IP(?:卡|电话|地址)|K党|K歌之王|N年|PC机|PH值|SIM卡|VISA卡|QQ号|RSS订阅|T恤衫?|T型?台|X光线?|X射线",
    "江南[Ss]tyle|阿Q|小S|(?<![庞偌伟扩巨])大S",
  ].join("|"),
  "g",
);

export function cutWords(text) {
  const parted = text.replace(MIXED, "\n$&\n");
  return [...parted.matchAll(WORD)].flatMap(([word]) => word.toLowerCase().match(LETTERS) ?? []);
}

/** From 0 to 1, to the judge's last digit; 0 where one of them has nothing that it counts. */
export function scoreRougeL(answer, reference) {
  const ours = cutWords(answer);
  const theirs = cutWords(reference);
  if (!ours.length || !theirs.length) return 0;
  const common = countCommon(ours, theirs);
  const precision = common / ours.length;
  const recall = common / theirs.length;
  return common ? (2 * precision * recall) / (precision + recall) : 0;
}

/** Whether there is anything that the course could count. */
export const canScore = (reference) => cutWords(reference).length > 0;

/** The longest common subsequence, a row of its table at a time, as bits of one number. */
function countCommon(ours, theirs) {
  const all = (1n << BigInt(ours.length)) - 1n;
  const places = new Map();
  ours.forEach((word, place) => places.set(word, (places.get(word) ?? 0n) | (1n << BigInt(place))));
  let row = all;
  for (const word of theirs) {
    const met = row & (places.get(word) ?? 0n);
    row = ((row + met) | (row - met)) & all;
  }
  return ours.length - row.toString(2).replaceAll("0", "").length;
}
