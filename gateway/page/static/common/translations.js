// Every word of the page, in both languages, and how numbers are written in them.

const WORDS = {
  skip: ["Skip to the questions", "跳到提问区"],
  language: ["Language", "语言"],
  theme: ["Colours", "配色"],
  "theme.auto": ["Auto", "自动"],
  "theme.light": ["Light", "浅色"],
  "theme.dark": ["Dark", "深色"],
  tabs: ["What to do", "操作"],
  side: ["State and figures", "状态与指标"],
  options: ["Options", "选项"],
  "options.maxTokens": ["Longest answer, tokens", "回答最长（词元）"],
  "options.temperature": ["Temperature", "温度"],
  "options.system": ["System prompt", "系统提示词"],
  "options.default": ["default", "默认"],
  "options.any": ["as the model allows", "由模型决定"],

  "tab.ask": ["Ask", "提问"],
  "tab.batch": ["Batch", "批量"],
  "ask.label": ["Your question", "你的问题"],
  "ask.placeholder": ["Ask something …", "输入问题……"],
  "ask.hint": ["Enter sends, Shift+Enter starts a new line, Esc stops", "回车发送，Shift+回车换行，Esc 停止"],
  "ask.send": ["Ask", "提问"],
  "ask.stop": ["Stop", "停止"],
  "ask.turns": ["Conversation", "对话"],
  "ask.follow": ["Send this conversation along", "附带本次对话"],
  "ask.alone": ["The question is sent alone.", "只发送这个问题本身。"],
  "ask.noTemplate": ["This model has no chat template: each question is asked alone, as /predict asks it.", "此模型没有聊天模板：每个问题单独提问，方式与 /predict 相同。"],
  "ask.contextNone": ["Nothing goes along yet: this begins a conversation.", "还没有可附带的内容：这是新对话的开始。"],
  "ask.context": ["The question takes {count} earlier turn{s} along, marked above.", "将附带前面 {count} 轮问答（上方有标记）。"],
  "ask.goesAlong": ["goes along", "将附带"],
  "ask.sentAlong": ["{count} earlier turn{s} went along", "附带了前面 {count} 轮"],
  "ask.anew": ["Start anew", "开始新对话"],
  "ask.divide": ["New conversation: nothing above goes along", "新对话：以上内容不再附带"],
  "ask.kept": ["Kept in this browser over a reload", "已保存在此浏览器中，刷新后仍在"],
  "ask.clear": ["Clear all", "全部清除"],
  "ask.plain": ["As plain text", "显示原文"],
  "ask.formed": ["Formatted", "显示格式"],
  "ask.examples": ["For example", "例如"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  notCopied: ["Not copied: the browser does not allow it", "未复制：浏览器不允许"],
  "copy.answer": ["Copy answer {place}", "复制第 {place} 个回答"],
  "copied.answer": ["Copied answer {place}", "已复制第 {place} 个回答"],
  "notCopied.answer": ["Not copied: the browser does not allow it (answer {place})", "未复制：浏览器不允许（第 {place} 个回答）"],
  "code.label": ["Code", "代码"],
  "fold.open": ["Show all of it", "展开全文"],
  "fold.close": ["Fold", "收起"],
  "demo.note": [
    "This is the demo model. It knows one page about CUDA and nothing else. Ask it what stands under “For example”; all that it was taught is in demo/questions.jsonl.",
    "这是演示模型，只学过一页 CUDA 问答，别的都不会。请从“例如”中的问题问起；它学过的全部问题在 demo/questions.jsonl 中。",
  ],
  "ask.example": ["Ask: {text}", "提问：{text}"],
  "ask.waiting": ["Waiting for the first token …", "等待第一个词元……"],
  "ask.thinking": ["Thinking", "思考过程"],
  "ask.first": ["first token after {value}", "首词元用时 {value}"],
  "ask.tokens": ["{count} token{s} written", "生成 {count} 个词元"],
  "ask.rate": ["{value} tokens/s", "{value} 词元/秒"],
  "ask.total": ["{value} in all", "总用时 {value}"],
  "ask.cut": ["cut at the longest length", "到达长度上限"],
  "ask.stopped": ["stopped", "已停止"],
  "ask.again": ["Ask again", "重新提问"],
  "ask.empty": ["The model gave an empty answer.", "模型的回答为空。"],
  "ask.doneWhole": ["The answer is complete.", "回答完成。"],
  "ask.done": ["The answer is complete: {count} token{s}.", "回答完成：{count} 个词元。"],

  "batch.pick": ["Choose a file", "选择文件"],
  "batch.drop": ["or drop one here", "或拖放到这里"],
  "batch.formats": [
    "One question a line, JSON, JSONL, or the course's form （1. 问题：… 答案：…",
    "每行一个问题、JSON、JSONL，或课程格式（1. 问题：… 答案：…",
  ],
  "batch.paste": ["… or paste questions here", "……或把问题粘贴到这里"],
  "batch.remove": ["Remove", "移除"],
  "batch.how": ["How to send them", "发送方式"],
  "batch.one": [
    "All in one call: fastest; progress is counted by the engine",
    "一次全部发送：最快；进度来自引擎计数",
  ],
  "batch.pieces": ["In pieces: answers show as they come. Size:", "分批发送：边答边显示。每批："],
  "batch.pieceSize": ["Questions in a piece", "每批问题数"],
  "batch.run": ["Run {count} question{s}", "运行 {count} 个问题"],
  "batch.runNone": ["Run", "运行"],
  "batch.stop": ["Stop", "停止"],
  "batch.change": ["Change the questions", "修改问题"],
  "batch.found": ["{count} question{s} found ({format})", "识别出 {count} 个问题（{format}）"],
  "batch.references": ["{count} with a reference answer", "其中 {count} 个带参考答案"],
  "batch.repeated": ["{count} of them repeated", "其中 {count} 个重复"],
  "batch.skipped": ["Left out, without a question: {count}", "已略过 {count} 行没有问题的内容"],
  "batch.moreExamples": ["and {count} more", "还有 {count} 个"],
  "batch.split": ["More than one call takes ({limit}): {pieces} calls are made.", "超过单次上限（{limit}）：将分 {pieces} 次发送。"],
  "format.lines": ["lines of text", "按行文本"],
  "format.json": ["JSON", "JSON"],
  "format.jsonl": ["JSONL", "JSONL"],
  "format.course": ["the course's form", "课程格式"],
  "batch.none": ["No question found in this.", "没有识别出问题。"],
  "batch.badJson": ["This is not valid JSON: {reason}", "不是有效的 JSON：{reason}"],
  "batch.badLine": ["Line {line} is not valid JSON: {reason}", "第 {line} 行不是有效的 JSON：{reason}"],
  "batch.tooLarge": ["This file is {size}; the gateway takes {limit} in one call.", "文件有 {size}；网关单次最多接收 {limit}。"],
  "batch.unreadable": ["This file could not be read: {reason}", "无法读取文件：{reason}"],
  "batch.notText": [
    "This is not a text file, or not in UTF-8. Save it as text, JSON or JSONL in UTF-8.",
    "这不是文本文件，或编码不是 UTF-8。请另存为 UTF-8 编码的文本、JSON 或 JSONL。",
  ],
  "batch.oneTooLarge": ["Question {number} alone is larger than one call may be.", "第 {number} 个问题本身就超过单次上限。"],

  "run.running": ["Running …", "运行中……"],
  "run.waiting": ["Waiting for the engine …", "等待引擎……"],
  "run.done": ["{count} question{s} answered", "已回答 {count} 个问题"],
  "run.doneFailed": ["{count} answered, {failed} failed", "已回答 {count} 个，失败 {failed} 个"],
  "run.stopped": ["Stopped: {count} of {total} answered", "已停止：{total} 个中已回答 {count} 个"],
  "run.broken": ["Failed: {count} of {total} answered", "失败：{total} 个中已回答 {count} 个"],
  "run.exact": ["{done} of {total} answered · running for {time}", "{total} 个中已回答 {done} 个 · 已运行 {time}"],
  "run.estimate": [
    "About {done} of {total} answered, by the engine's own count (other callers' answers count too) · running for {time}",
    "按引擎计数，{total} 个中约已回答 {done} 个（其他调用者的回答也计在内） · 已运行 {time}",
  ],
  "run.elapsed": ["The engine has {count} question{s} · running for {time}", "引擎正在处理 {count} 个问题 · 已运行 {time}"],
  "run.left": ["about {time} left", "约剩 {time}"],
  "run.retryIn": ["Trying again in {time}: {reason}", "{time} 后重试：{reason}"],
  "run.again": ["Run the {count} unanswered again", "重新运行未回答的 {count} 个"],
  "run.more": ["Show {count} more", "再显示 {count} 条"],
  "run.download": ["Download as {format}", "下载 {format}"],
  "fact.time": ["Time", "用时"],
  "fact.rate": ["Questions/s", "问题/秒"],
  "fact.characters": ["Characters/s", "字符/秒"],
  "fact.tokens": ["Tokens/s, by the engine's count", "词元/秒（引擎计数）"],
  "fact.mean": ["Mean answer", "平均回答长度"],
  "fact.characterCount": ["{count} characters", "{count} 字符"],
  "fact.same": ["Same as the reference", "与参考答案相同"],
  "fact.of": ["{count} of {total}", "{total} 个中 {count} 个"],
  "fact.rouge": ["ROUGE-L as the course counts: Latin letters and digits alone", "ROUGE-L（课程算法：只计拉丁字母和数字）"],
  "fact.rougeValue": ["mean {value} of {count} answer{s}", "{count} 个回答平均 {value}"],
  "fact.rougeNone": [" · 0 for {count} whose reference has none of them", " · 其中 {count} 个参考答案无可计字符，计 0"],
  "fact.where": ["Where the time went", "时间去向"],
  "fact.whereValue": ["queue {queue} · engine {engine} · gateway {gateway}", "排队 {queue} · 引擎 {engine} · 网关 {gateway}"],
  "row.reference": ["Reference", "参考答案"],
  "row.same": ["same as the reference", "与参考答案相同"],
  "row.rouge": ["ROUGE-L {value}", "ROUGE-L {value}"],
  "row.rougeNone": [
    "ROUGE-L 0: the reference has no Latin letter and no digit, and the course counts nothing else",
    "ROUGE-L 0：参考答案中没有拉丁字母和数字，课程算法不计其他字符",
  ],

  engine: ["Engine", "引擎"],
  "engine.number": ["Engine {number}", "引擎 {number}"],
  "engine.of": ["{ready} of {total} engines ready", "{total} 个引擎中 {ready} 个就绪"],
  stop: [". ", "。"],
  state: ["State", "状态"],
  "state.unknown": ["Looking …", "查看中……"],
  "state.key": ["Needs a key", "需要密钥"],
  "state.unreachable": ["Gateway not reachable", "无法连接网关"],
  "state.ready": ["Ready", "就绪"],
  "state.starting": ["Loading", "加载中"],
  "state.warming": ["Warming up", "预热中"],
  "state.restarting": ["Restarting", "重启中"],
  "state.waiting": ["Waiting to restart", "等待重启"],
  "state.parked": ["Stopped until it is wanted", "已停止，有请求时启动"],
  "state.sleeping": ["Asleep until it is wanted", "休眠中，有请求时唤醒"],
  "state.joining": ["Waiting for its other hosts", "等待其他主机加入"],
  "state.draining": ["Finishing", "收尾中"],
  "state.stopped": ["Stopped", "已停止"],
  "state.stopping": ["Stopping", "停止中"],
  "state.down": ["Not answering", "无响应"],
  "stage.reading_config": ["Reading the configuration", "读取配置"],
  "stage.starting_core": ["Starting the engine's core", "启动引擎核心"],
  "stage.loading_weights": ["Loading weights", "加载权重"],
  "stage.compiling": ["Compiling", "编译"],
  "stage.compiled_before": ["Taking compiled code from the cache", "读取编译缓存"],
  "stage.sizing_cache": ["Sizing the KV cache", "分配 KV 缓存"],
  "stage.capturing_graphs": ["Capturing CUDA graphs", "捕获 CUDA 图"],
  "stage.warming_kernels": ["Warming kernels", "预热内核"],
  "stage.listening": ["Opening its port", "开始监听"],
  "stage.process": ["Starting the process", "启动进程"],
  "stage.first_token": ["Asking for the first token", "请求第一个词元"],
  "stage.warmup": ["Answering the warm-up batch", "回答预热批次"],
  "notice.unreachable": [
    "The gateway does not answer. This page keeps trying and recovers by itself.",
    "网关没有响应。本页会不断重试，恢复后自动继续。",
  ],
  "notice.key": ["The figures need an API key.", "查看状态需要 API 密钥。"],
  "notice.loading": ["The engine is loading.", "引擎正在加载。"],
  "notice.restarting": ["The engine ended and is being restarted.", "引擎已退出，正在重启。"],
  "notice.warming": ["The engine is warming up.", "引擎正在预热。"],
  "notice.down": ["No engine answers.", "没有可用的引擎。"],
  "notice.stopping": ["The gateway is stopping; it takes no new questions.", "网关正在停止，不再接受新问题。"],
  "notice.held": ["Questions sent now are kept until it is ready.", "现在发送的问题会保留到就绪。"],
  "notice.left": ["about {time} left", "约剩 {time}"],
  "notice.elapsed": ["{time} so far", "已用 {time}"],
  "notice.back": ["The engine is ready again.", "引擎已恢复就绪。"],

  "engine.model": ["Model", "模型"],
  "engine.context": ["Context", "上下文"],
  "engine.contextValue": ["{count} tokens", "{count} 词元"],
  "engine.device": ["Device", "设备"],
  "engine.profile": ["Profile", "配置档"],
  "engine.vllm": ["vLLM", "vLLM"],
  "engine.start": ["Last start took", "上次启动用时"],
  "engine.restarts": ["Restarts", "重启次数"],
  "engine.cached": ["Prompt tokens found in the cache", "提示词元的缓存命中率"],
  "engine.preempted": ["Preempted for lack of cache", "因缓存不足被抢占"],
  "engine.answered": ["Answers since its start", "启动以来已回答"],
  "engine.since": ["{state} for {time}", "{state}，已持续 {time}"],
  "engine.reason": ["Reason", "原因"],
  "engine.stages": ["Steps of the start", "启动步骤"],

  "crash.title": ["Last crash", "最近一次崩溃"],
  "crash.ago": ["{time} ago", "{time}前"],
  "crash.exit": ["It exited with code {code}.", "进程退出，退出码 {code}。"],
  "crash.exitUnknown": ["It exited.", "进程已退出。"],
  "crash.signal": ["It was killed by {signal}.", "被 {signal} 终止。"],
  "crash.start_timeout": ["It did not answer in time.", "启动超时，没有响应。"],
  "crash.hang": ["It hung.", "引擎卡住。"],
  "crash.after": ["It had run for {time}.", "此前已运行 {time}。"],
  "crash.neverReady": ["It had never been ready.", "此前从未就绪。"],
  "crash.cause": ["Cause", "原因"],
  "crash.lines": ["Its last lines", "最后的日志"],
  "crash.hidden": ["Its log is shown to admin keys, or on the gateway's own machine where there are no keys.", "日志只对管理员密钥可见；没有设置密钥时，只在网关本机可见。"],

  live: ["Live", "实时"],
  "live.window": ["last 2 minutes", "最近 2 分钟"],
  "live.rate": ["Tokens/s", "词元/秒"],
  "live.running": ["In flight", "处理中"],
  "live.waiting": ["Waiting", "排队"],
  "live.kv": ["KV cache in use", "KV 缓存占用"],
  "live.first": ["Time to first token", "首词元时间"],
  "live.inEngine": ["{count} in the engine", "引擎内 {count}"],
  "live.atGateway": ["{gateway} at the gateway · {engine} in the engine", "网关 {gateway} · 引擎 {engine}"],
  "live.used": [
    "Since the gateway started: {requests} request{s} · {tokens} tokens written",
    "网关启动以来：{requests} 个请求 · 生成 {tokens} 个词元",
  ],
  "live.noFigures": ["The engine gives no figures of its own.", "引擎没有提供自己的指标。"],
  "live.chart": ["{name}: now {now}; lowest {low}, highest {high} in the last 2 minutes", "{name}：当前 {now}；最近 2 分钟最低 {low}，最高 {high}"],
  "live.chartEmpty": ["{name}: no figures yet", "{name}：暂无数据"],
  "live.at": ["{value}, {time} ago", "{value}，{time}前"],

  "key.button": ["Key", "密钥"],
  "key.title": ["API key", "API 密钥"],
  "key.text": [
    "This gateway asks for a key. It stays in this tab and is forgotten when the tab is closed.",
    "此网关需要密钥。密钥只保存在当前标签页，关闭后即被清除。",
  ],
  "key.label": ["Key", "密钥"],
  "key.use": ["Use it", "使用"],
  "key.cancel": ["Not now", "暂不"],
  "key.forget": ["Forget it", "清除"],
  "key.unknown": ["This key is not known to the gateway.", "网关不认识这个密钥。"],
  "key.empty": ["Enter a key.", "请输入密钥。"],

  "error.network": ["The gateway could not be reached.", "无法连接网关。"],
  "error.broken": ["The connection broke off before the answer was complete.", "回答未完成，连接已中断。"],
  "error.key": ["This needs an API key: use the button Key above.", "需要 API 密钥：请点击上方的“密钥”。"],
  "error.badKey": ["The gateway does not know this API key.", "网关不认识这个 API 密钥。"],
  "error.notReady": ["The engine is not ready. Your question is sent when it is.", "引擎未就绪，恢复后会自动发送你的问题。"],
  "error.allowance": ["This key's allowance is used up for now.", "这个密钥的额度暂时用完。"],
  "error.budget": [
    "Too few of this key's tokens for the day or the month are left.",
    "这个密钥当天或当月剩余的 token 额度不够。",
  ],
  "error.limits": ["What this key may still use cannot be looked up just now.", "暂时无法查询这个密钥的额度。"],
  "error.busy": ["Too much is waiting already.", "排队已满。"],
  "error.tooLong": ["The question is too long for the model.", "问题超出模型长度。"],
  "error.tooMuch": ["This is more than one call may hold.", "超过单次请求的上限。"],
  "error.empty": ["The question is empty.", "问题为空。"],
  "error.notText": ["The question holds half a character, which is no text.", "问题中含有残缺字符，不是有效文本。"],
  "error.notAllowed": ["This key may not do this.", "这个密钥没有此权限。"],
  "error.foreign": [
    "The gateway does not take calls under this address.",
    "网关不接受来自此地址的请求。",
  ],
  "error.noModel": ["There is no such model here.", "这里没有这个模型。"],
  "error.late": ["Its time ran out before it was answered.", "未能在时限内完成。"],
  "error.tooLongAlong": [
    "The question and what went along with it are too long for the model: start anew, or send it alone.",
    "问题连同附带的问答超出模型长度：请开始新对话，或单独发送。",
  ],
  "error.sizes": [" It has {count} tokens; with its answer the model takes {most}.", "问题有 {count} 个词元，模型连同回答最多接受 {most} 个。"],
  "error.refused": ["The gateway does not take this.", "网关不接受这个请求。"],
  "error.field": ["The gateway does not take this value: {field}.", "网关不接受这个值：{field}。"],
  "error.engineRefused": ["The engine refused this question.", "引擎拒绝了这个问题。"],
  "error.gateway": ["The gateway failed on this.", "网关处理失败。"],
  "error.status": ["The gateway answered {status}.", "网关返回 {status}。"],
  "error.engine": ["The engine failed on this.", "引擎处理失败。"],
  "error.garbled": ["The answer could not be read.", "无法解析返回内容。"],
  "error.request": ["request {id}", "请求号 {id}"],
};

const EXAMPLES = {
  en: [
    "What is a warp in CUDA?",
    "What does __syncthreads() guarantee to a block?",
    "Why do coalesced memory accesses matter on a GPU?",
  ],
  zh: [
    "多个线程读取共享内存中同一个地址会不会产生 bank 冲突？请说明原因。",
    "CUDA 的 warp 是什么？为什么说它是 GPU 指令调度的基本单位？",
    "什么是网格跨步循环（grid-stride loop），它比一个线程处理一个元素好在哪里？",
  ],
};

export const LANGUAGES = ["en", "zh"];
let language = "en";

export function chooseLanguage(stored, preferred) {
  if (LANGUAGES.includes(stored)) return stored;
  const first = preferred.find((name) => LANGUAGES.includes(name.slice(0, 2).toLowerCase()));
  return first ? first.slice(0, 2).toLowerCase() : "en";
}

export function setLanguage(name) {
  language = name;
  document.documentElement.lang = name === "zh" ? "zh-CN" : "en";
}

export const currentLanguage = () => language;
export const examples = () => EXAMPLES[language];
export const hasWord = (key) => key in WORDS;
export const allWords = () => WORDS;

export function say(key, values = {}) {
  const text = WORDS[key]?.[LANGUAGES.indexOf(language)] ?? key;
  // The English plural, where a text has one.
  const all = { s: (values.count ?? values.requests) === "1" ? "" : "s", ...values };
  return text.replace(/\{(\w+)\}/g, (_, name) => all[name] ?? "");
}

/** Puts the words into everything below `root` that names one. */
export function translate(root) {
  const put = { t: "textContent", tPlaceholder: "placeholder" };
  for (const [name, property] of Object.entries(put)) {
    const attribute = name === "t" ? "data-t" : "data-t-placeholder";
    for (const element of root.querySelectorAll(`[${attribute}]`)) {
      element[property] = say(element.dataset[name]);
    }
  }
  for (const element of root.querySelectorAll("[data-t-label]")) {
    element.setAttribute("aria-label", say(element.dataset.tLabel));
  }
}

export function number(value, digits = 0) {
  return new Intl.NumberFormat(language, { maximumFractionDigits: digits }).format(value);
}

/** Always so many digits behind the point, for figures that are compared. */
export function digits(value, count) {
  return new Intl.NumberFormat(language, { minimumFractionDigits: count, maximumFractionDigits: count }).format(value);
}

/** Three figures are enough for a rate. */
export function rate(value) {
  return number(value, value < 10 ? 1 : 0);
}

export function percent(share) {
  return new Intl.NumberFormat(language, { style: "percent", maximumFractionDigits: share < 0.1 ? 1 : 0 }).format(share);
}

export function bytes(count) {
  const [size, unit] = count < 2 ** 20 ? [count / 2 ** 10, "KB"] : [count / 2 ** 20, "MB"];
  return `${number(size, 1)} ${unit}`;
}

/** A time span as people say it: 34 ms, 1.2 s, 3 min 20 s, 2 h 5 min. */
export function span(seconds) {
  const units = language === "zh" ? ["毫秒", "秒", "分", "小时", "天"] : ["ms", "s", "min", "h", "d"];
  if (seconds < 0.9995) return `${number(seconds * 1000)}\u00a0${units[0]}`;
  if (seconds < 59.95) return `${number(seconds, seconds < 9.95 ? 1 : 0)}\u00a0${units[1]}`;
  const whole = Math.round(seconds);
  const pair = (size, unit, next, nextUnit) => {
    const rest = Math.floor((whole % size) / next);
    return `${Math.floor(whole / size)}\u00a0${unit}` + (rest ? `\u00a0${rest}\u00a0${nextUnit}` : "");
  };
  if (whole < 3600) return pair(60, units[2], 1, units[1]);
  if (whole < 86400) return pair(3600, units[3], 60, units[2]);
  return pair(86400, units[4], 3600, units[3]);
}

/** A time that is still running: whole seconds, so that it does not flicker. */
export function running(seconds) {
  return span(Math.max(1, Math.floor(seconds)));
}

export function clock(date) {
  return new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "medium" }).format(date);
}
